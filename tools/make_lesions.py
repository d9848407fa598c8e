"""Write a made-up expert set with patients: drawn skin lesions in the layout of PAD-UFES-20 (Pacheco et al. 2020).

python tools/make_lesions.py OUT
python tools/make_lesions.py OUT --patients 100 --size 64

OUT/metadata.csv names the images in OUT/imgs_part_1/ to OUT/imgs_part_3/ with their diagnosis, patient and lesion. The
classes have about the shares of the real set. A patient's images share skin and light, and those of a lesion its shape:
split by image, they score higher than split by patient. The drawings say nothing about medicine.
"""

import csv
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import numpy as np
from PIL import Image
from tqdm import tqdm

from util.errors import UserError, user_errors
from util.parser import Parser

# The columns of the published table, in their order; those that are not drawn stay empty.
COLUMNS = "patient_id lesion_id smoke drink background_father background_mother age pesticide gender".split()
COLUMNS += "skin_cancer_history cancer_history has_piped_water has_sewage_system fitspatrick region diameter_1".split()
COLUMNS += "diameter_2 diagnostic itch grew hurt changed bleed elevation img_id biopsed".split()
PARTS = 3


@dataclass(frozen=True)
class Look:
    """What a diagnosis looks like. `count`: its images in the real set, but three times the 52 melanomas, so that small
    sets have some; `colour`: RGB of the centre; `radius`: as a share of the image's side; `ragged`: of the outline;
    `soft`: width of the edge; `speckle`: strength of fine texture; `rim`: brightness of a ring at the edge."""

    count: int
    colour: tuple[int, int, int]
    radius: float
    ragged: float
    soft: float
    speckle: float
    rim: float


LOOKS = {
    "ACK": Look(730, (190, 110, 98), 0.27, 0.14, 0.22, 0.25, 0.0),
    "BCC": Look(845, (188, 112, 106), 0.23, 0.08, 0.08, 0.04, 0.35),
    "MEL": Look(156, (92, 58, 52), 0.29, 0.30, 0.06, 0.12, 0.0),
    "NEV": Look(244, (120, 76, 60), 0.18, 0.05, 0.10, 0.04, 0.0),
    "SCC": Look(192, (178, 90, 76), 0.27, 0.20, 0.08, 0.20, -0.35),
    "SEK": Look(235, (138, 94, 66), 0.27, 0.08, 0.05, 0.30, 0.0),
}
LIGHT_SKIN, DARK_SKIN = np.array([236, 196, 174.0]), np.array([148, 100, 76.0])


@dataclass(frozen=True)
class Patient:
    """Skin (3,) and light, which all images of a patient share."""

    skin: np.ndarray
    slope: np.ndarray  # (2,): change of brightness over the height and the width
    tint: np.ndarray  # (3,): factor of every channel, of the camera


@dataclass(frozen=True)
class Lesion:
    """A diagnosis and what all images of one lesion share: `waves` (5, 2), amplitude and phase of the outline; `shade`
    (3,), added to its colour; `scale`, of its radius."""

    diagnosis: str
    waves: np.ndarray
    shade: np.ndarray
    scale: float


def draw_patient(rng) -> Patient:
    skin = LIGHT_SKIN + (DARK_SKIN - LIGHT_SKIN) * rng.uniform() ** 2
    return Patient(skin, rng.uniform(-0.25, 0.25, 2), rng.uniform(0.9, 1.1, 3))


def draw_lesion(rng) -> Lesion:
    counts = np.array([look.count for look in LOOKS.values()])
    diagnosis = list(LOOKS)[rng.choice(len(LOOKS), p=counts / counts.sum())]
    waves = np.stack([rng.normal(0, LOOKS[diagnosis].ragged / 2, 5), rng.uniform(0, 2 * np.pi, 5)], axis=1)
    return Lesion(diagnosis, waves, rng.normal(0, 16, 3), rng.uniform(0.75, 1.3))


def photograph(rng, patient: Patient, lesion: Lesion, size: int) -> np.ndarray:
    """Return one photograph (size, size, 3) uint8 of a lesion: turned, moved and scaled at random."""
    look = LOOKS[lesion.diagnosis]
    rows, columns = (np.mgrid[0:size, 0:size] + 0.5) / size - 0.5
    picture = patient.skin * (1 + (patient.slope @ np.stack([rows.ravel(), columns.ravel()])).reshape(size, size, 1))
    picture = picture + rng.normal(0, 4, (size, size, 3))
    y, x = (coordinate - rng.uniform(-0.1, 0.1) for coordinate in (rows, columns))
    angle = np.arctan2(y, x) + rng.uniform(0, 2 * np.pi)
    outline = 1 + sum(wave * np.cos(n * angle + phase) for n, (wave, phase) in enumerate(lesion.waves, 2))
    # 1 at the outline, 0 in the centre.
    distance = np.hypot(y, x) / (look.radius * lesion.scale * rng.uniform(0.9, 1.1) * outline.clip(0.2))
    inside = 1 / (1 + np.exp((distance - 1) / (look.soft / 2)))
    texture = 1 + look.speckle * rng.normal(0, 1, (size, size)) + look.rim * np.exp(-(((distance - 0.85) / 0.15) ** 2))
    colour = (np.array(look.colour) + lesion.shade) * texture[..., None]
    picture = picture + inside[..., None] * (colour - picture)
    return (picture * patient.tint).clip(0, 255).round().astype(np.uint8)


def draw(patients: int, size: int, seed: int) -> Iterator[tuple[dict, np.ndarray]]:
    """Yield a row of the table and an image (size, size, 3) for every photograph. As in the real set a patient has 1.2
    lesions on average, and a lesion 1.4 images."""
    lesion_id = 0
    for number in range(1, patients + 1):
        # RandomState, not Generator: NumPy keeps the numbers that it draws for all versions.
        rng = np.random.RandomState(np.random.MT19937(np.random.SeedSequence((seed, number))))
        patient, age = draw_patient(rng), rng.randint(6, 95)
        for _ in range(1 + rng.poisson(0.2)):
            lesion, lesion_id = draw_lesion(rng), lesion_id + 1
            for _ in range(1 + rng.poisson(0.4)):
                row = dict(patient_id=f"PAT_{number}", lesion_id=lesion_id, age=age, diagnostic=lesion.diagnosis)
                row |= dict(img_id=f"PAT_{number}_{lesion_id}_{rng.randint(1000)}.png")
                yield row, photograph(rng, patient, lesion, size)


def write(folder: Path, patients: int, size: int, seed: int) -> int:
    """Write the data set -> the number of images."""
    rows = {}
    for part in range(1, PARTS + 1):
        (folder / f"imgs_part_{part}").mkdir(parents=True, exist_ok=True)
    for row, picture in tqdm(draw(patients, size, seed), "drawing", unit=" images", disable=None):
        if row["img_id"] in rows:
            continue  # two photographs of a lesion with the same random number
        rows[row["img_id"]] = row
        Image.fromarray(picture).save(folder / f"imgs_part_{len(rows) % PARTS + 1}" / row["img_id"])
    with open(folder / "metadata.csv", "w", encoding="utf-8", newline="") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows.values())
    return len(rows)


def get_args_parser() -> Parser:
    parser = Parser((__doc__ or "").partition("\n")[0], "")
    parser.add_argument("folder", type=Path, metavar="OUT", help="folder to write, which is created")
    parser.add_argument("--patients", default=300, type=int, help="patients, with 1.7 images each on average")
    parser.add_argument("--size", default=32, type=int, help="side of an image in pixels")
    parser.add_argument("--seed", default=0, type=int, help="which patients")
    return parser


def main(args) -> None:
    """Write the data set. Raises UserError for bad flags, and for a folder that is not empty or cannot be written."""
    folder = args.folder
    if args.patients < 1 or not 8 <= args.size <= 4096 or not 0 <= args.seed < 2**31:
        raise UserError("--patients must be positive, --size from 8 to 4096, --seed not negative and below 2147483648")
    if os.path.lexists(folder) and (not folder.is_dir() or os.listdir(folder)):
        raise UserError(f"{folder} is {'not empty' if folder.is_dir() else 'not a folder'}: give another folder")
    try:
        count = write(folder, args.patients, args.size, args.seed)
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    print(
        f"{count} images of {args.patients} patients; read them with\n  --dataset filelist --data_path {folder} "
        f"--train_list {folder / 'metadata.csv'} --group_column patient_id --val_fraction 0.2"
    )


if __name__ == "__main__":
    with user_errors("make_lesions.py"):
        main(get_args_parser().parse_args())
