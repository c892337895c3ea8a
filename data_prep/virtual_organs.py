"""Organs of the virtual abdomen, drawn for one patient.

Coordinates are those of a standard adult, see `virtual_structures`. Organs are listed in the order
of painting, one over the other, each with a cuff of fat, so that they touch no more than real ones
do.
"""
# RUF005 takes the sums of vectors here for joined lists.
# ruff: noqa: RUF005

import numpy as np

from data_prep.virtual_shapes import rotation, smooth_minimum
from data_prep.virtual_structures import (
    Draw,
    Shape,
    Structure,
    ball,
    cut,
    flat,
    hollow,
    pipe,
    together,
)


def organs(draw: Draw, lordosis: float, female: bool) -> list[Structure]:
    """Draws one patient's organs, in the order of painting."""
    return [
        *_muscles(draw),
        *_liver(draw),
        *_bowel(draw),
        *_glands(draw),
        *_kidneys(draw),
        *_vessels(draw, lordosis),
        *_small_bowel(draw),
        *_pelvis(draw, female),
    ]


def _muscles(draw: Draw) -> list[Structure]:
    parts = []
    for side in (-1, 1):
        parts += [
            Structure("", ball((side * 38, -43, -60), (30, 23, 330)), flat("muscle", 5), 2.0),
            Structure("", ball((side * 40, -4, -110), (17, 17, 150)), flat("muscle", 5), 1.5),
            # The crura of the diaphragm.
            Structure(
                "",
                pipe([(side * 12, 18, -10), (side * 17, 22, 50), (side * 12, 40, 105)], [4, 5, 5]),
                flat("muscle", 4),
            ),
        ]
    heart = ball(draw.near((-22, 88, 170), 6), (62, 50, 46))
    parts.append(Structure("", heart, flat("heart", 5), 3.0))
    return parts


def _liver(draw: Draw) -> list[Structure]:
    right = draw.near((80, 28, 60), 5)
    lobes = together(
        [
            ball(right, draw.size((70, 85, 88)), draw.turn(spread=4)),
            ball(draw.near((4, 76, 78), 6), draw.size((68, 40, 41), 0.12), draw.turn(0, 12, -8)),
        ],
        18.0,
    )
    tip = ball(right + draw.near((22, 0, -66), 6), draw.size((24, 40, 50), 0.15))
    # Where the right kidney and adrenal lie against it.
    bed = ball((48, -8, 12), (48, 32, 64), rotation(-10, 14, 0))
    # The lower face looks down, back and left.
    normal = draw.near((-0.42, -0.40, -0.80), 0.06)
    normal /= np.linalg.norm(normal)
    hilum = draw.near((42, 46, 32), 4)

    def distance(canvas, part):
        points = [p[part] for p in canvas.points]
        face = sum(n * (p - h) for n, p, h in zip(normal, points, hilum, strict=True))
        face = np.asarray(face, np.float32)
        body = np.maximum(lobes.distance(canvas, part), face)
        body = smooth_minimum(body, tip.distance(canvas, part), 12.0)
        body = np.maximum(body, -bed.distance(canvas, part))
        return np.maximum(np.maximum(body, canvas.wall[part] + 16), canvas.dome[part] + 4)

    shape = Shape(np.minimum(lobes.lower, tip.lower), np.maximum(lobes.upper, tip.upper), distance)
    parts = [Structure("liver", shape, flat("liver", 3.5, coarse=3.0), 3.0, 1.0, "cavity")]
    cava = np.array([22, 30, 108])
    veins = [
        (cava, draw.near((70, 50, 92), 6), draw.near((118, 50, 60), 8)),
        (cava, draw.near((52, 78, 88), 6), draw.near((72, 100, 48), 8)),
        (cava, draw.near((8, 62, 98), 5), draw.near((-22, 90, 74), 8)),
    ]
    portal = [
        (hilum, draw.near((72, 48, 44), 5), draw.near((112, 24, 32), 8)),
        (hilum, draw.near((70, 56, 56), 5), draw.near((104, 72, 64), 8)),
        (hilum, draw.near((30, 72, 52), 5), draw.near((-4, 88, 62), 8)),
    ]
    for tissue, trees in (("hepatic", veins), ("portal", portal)):
        for start, middle, end in trees:
            branch = middle + 0.4 * (end - middle)
            aside = branch + draw.near((0, 0, 0), 26)
            parts += [
                Structure("hepatic_vessel", pipe(path, radii), flat(tissue, 3), 0.6, where="liver")
                for path, radii in (
                    ([start, middle, end], [5.5, 4.5, 2.0]),
                    ([branch, aside], [3.2, 1.6]),
                )
            ]
    bladder = ball(draw.near((66, 80, 4), 5), draw.size((14, 19, 27), 0.12), draw.turn(-25, 15, 0))
    parts.append(Structure("gall_bladder", bladder, hollow(1.5, "fluid", 900), 0.7, 1.0))
    return parts


def _bowel(draw: Draw) -> list[Structure]:
    """Spleen, oesophagus, stomach, duodenum and colon."""
    rng = draw.rng
    spleen = cut(
        ball(draw.near((-112, -8, 66), 5), draw.size((35, 54, 63), 0.1), draw.turn(18, -12, 12)),
        ball(draw.near((-74, 16, 62), 5), (26, 30, 44)),
    )
    hiatus = draw.near((-18, 42, 106), 3)
    esophagus = pipe(
        [hiatus + (10, -12, 160), hiatus + (8, -8, 50), hiatus, hiatus + (-16, -2, -10)],
        [9, 9.5, 10, 9],
    )
    fullness = float(np.exp(rng.normal(0, 0.15 * draw.variation)))
    stomach = pipe(
        [
            draw.near((-74, 12, 102)),
            draw.near((-80, 36, 78)),
            draw.near((-66, 72, 44)),
            draw.near((-26, 88, 16)),
            draw.near((16, 76, 6)),
        ],
        np.array([28, 31, 25, 18, 11]) * fullness,
    )
    content = ("fluid", "fluid", "contrast")[rng.integers(3)]
    duodenum = pipe(
        [(22, 74, 6), (50, 62, 6), (58, 48, -14), (54, 42, -44), (20, 42, -52), (-22, 44, -40)]
        + rng.normal(0, 3 * draw.variation, (6, 3)),
        [11, 12, 13, 12, 11, 11],
    )
    sag = rng.normal(0, 12 * draw.variation)
    colon_path = np.array(
        [
            (112, 34, -170), (114, 32, -110), (112, 36, -60), (92, 74, -44), (48, 102, -52 - sag),
            (0, 108, -58 - sag), (-52, 100, -40 - sag), (-96, 72, -4), (-118, 36, 26),
            (-126, 8, 4), (-126, 4, -60), (-124, 8, -130), (-96, 30, -190), (-30, 12, -215),
        ]
    ) + rng.normal(0, 4 * draw.variation, (14, 3))  # fmt: skip
    width = 18 * np.exp(rng.normal(0, 0.16 * draw.variation, 14))
    stool = ("stool", "fluid", "stool", "contrast")[rng.integers(4)]
    return [
        Structure("spleen", spleen, flat("spleen", 4), 2.0, 2.0, "cavity"),
        Structure("stomach", stomach, hollow(4, content, rng.uniform(45, 85)), 2.5, 2.5, "cavity"),
        Structure("esophagus", esophagus, hollow(5.5, "fluid", 900), 0.6, 2.0),
        Structure("colon", pipe(colon_path, width, 5), hollow(2.5, stool, rng.uniform(40, 115)),
                  3.5, 3.0, "cavity"),
        Structure("duodenum", duodenum, hollow(3, "fluid", 900), 1.5, 2.0, "cavity"),
    ]  # fmt: skip


def _glands(draw: Draw) -> list[Structure]:
    """Pancreas and adrenals."""
    lean = 1.06 * float(np.exp(draw.rng.normal(0, 0.1 * draw.variation)))
    head = draw.near((36, 50, -14))
    pancreas = together(
        [
            ball(head, np.array([16, 15, 27]) * lean),
            pipe(
                [
                    head + (-4, 2, 10),
                    draw.near((12, 60, 6), 3),
                    draw.near((-18, 58, 18), 3),
                    draw.near((-52, 42, 28), 3),
                    draw.near((-86, 18, 42), 4),
                ],
                np.array([12, 10.5, 11, 11, 9.5]) * lean,
            ),
        ],
        8.0,
    )

    def lobulated(canvas, part, distance, values):
        # Fat between the lobules.
        fine = canvas.fields["fine"][part]
        return values["pancreas"] + 5 * fine - 45 * np.clip(fine - 1.0, 0, 1.5)

    parts = [Structure("pancreas", pancreas, lobulated, 1.7, 2.0, "cavity")]
    for side, name in ((-1, "adrenal_gland_left"), (1, "adrenal_gland_right")):
        top = draw.near((side * 34, 12, 64), 3)
        limbs = together(
            [
                pipe([top, top + (side * 9, -16, -10)], [4.6, 3.4]),
                pipe([top, top + (side * -1, -17, -8)], [4.2, 3.2]),
            ],
            2.0,
        )
        parts.append(Structure(name, limbs, flat("adrenal", 4), 0.5, 2.5))
    return parts


def _kidneys(draw: Draw) -> list[Structure]:
    parts = []
    for side, name, height in ((-1, "kidney_left", 6), (1, "kidney_right", -10)):
        center = draw.near((side * 68, 2, height), 5)
        # Upper poles lean inward and back; the hilum looks inward and forward.
        turn = draw.turn(-10, side * 14, side * -28, 5)
        kidney = ball(center, draw.size((29, 25, 54), 0.06), turn)
        inward = turn @ np.array([-side, 0.0, 0.0])
        sinus = ball(center + 17 * inward, (15, 9, 21), turn)
        pelvis = pipe(
            [
                center + 6 * inward + (0, 0, 8),
                center + 16 * inward,
                center + 30 * inward - (0, 0, 6),
            ],
            [3.0, 5.0, 3.0],
        )

        def parenchyma(canvas, part, distance, values):
            depth = -distance - 6.5 - 3.5 * canvas.fields["medium"][part]
            inner = np.clip(depth / 3 + 0.5, 0, 1)
            hu = values["cortex"] + inner * (values["medulla"] - values["cortex"])
            return hu + 5 * canvas.fields["fine"][part]

        parts += [
            Structure(name, kidney, parenchyma, 1.2, 5.0),
            Structure("", sinus, flat("fat", 12, 25), 2.0),
            Structure("", pelvis, flat("urine", 4), 0.8),
        ]
    return parts


def _vessels(draw: Draw, lordosis: float) -> list[Structure]:
    front = 34 + lordosis
    aorta = pipe(
        [(-14, 26, -330), (-6, front, -90), (-10, front, 0), (-12, 30, 80), (-20, 14, 330)],
        draw.size((9, 9.5, 10.5, 11.5, 13), 0.08),
    )
    cava = pipe(
        [(16, 26, -330), (19, 32, -90), (20, 34, 0), (23, 32, 70), (20, 38, 112), (14, 60, 160)],
        [10, 11, 12, 13, 13, 14],
    )
    trunk = draw.near((-11, 46, 44), 2)
    celiac = pipe([trunk + (0, -10, 4), trunk + (0, 6, 0), trunk + (4, 14, 2)], [4, 3.6, 3])
    confluence = draw.near((10, 50, 12), 2)
    portal = together(
        [
            pipe([confluence, draw.near((26, 48, 26), 2), (44, 47, 34)], [7, 7, 6.5]),
            pipe([confluence, draw.near((-30, 40, 24), 3), draw.near((-84, 10, 46), 3)], [6, 5, 4]),
            pipe([confluence, (8, 56, -30), (6, 62, -70)], [6, 5.5, 4.5]),
        ],
        3.0,
    )
    return [
        Structure("aorta", aorta, flat("aorta", 4), 0.5, 2.0),
        Structure("postcava", cava, flat("postcava", 4), 0.8, 1.0),
        Structure("celiac_trunk", celiac, flat("aorta", 4), 0.2, 1.0),
        Structure("portal_vein_and_splenic_vein", portal, flat("portal", 4), 0.5),
    ]


def _small_bowel(draw: Draw) -> list[Structure]:
    """Loops between the organs, and a few lymph nodes in the fat."""
    rng = draw.rng
    lower, upper = np.array([-100, 48, -190]), np.array([88, 104, 4])
    parts = []
    contents = ("fluid", "contrast", "fluid") if rng.random() < 0.4 else ("fluid", "fluid", "fluid")
    for content in contents * 3:
        # A curve that turns slowly and is thrown back by the sides of its box.
        place, heading = rng.uniform(lower, upper), rng.normal(0, 1, 3)
        path = []
        for _ in range(16):
            heading += rng.normal(0, 0.7, 3)
            heading /= np.linalg.norm(heading)
            place = place + 20 * heading
            out = (place < lower) | (place > upper)
            heading[out] *= -1
            place = np.clip(place, lower, upper)
            path.append(place)
        loop = pipe(path, rng.uniform(9.5, 13.5, 16), 3)
        parts.append(
            Structure(
                "intestine", loop, hollow(2.5, content, rng.uniform(90, 130)), 1.5, where="fat"
            )
        )
    for _ in range(rng.poisson(4)):
        node = ball(rng.uniform((-40, 30, -80), (40, 75, 60)), rng.uniform(2.5, 6, 3))
        parts.append(Structure("", node, flat("muscle", 3, 25), 0.5, where="fat"))
    return parts


def _pelvis(draw: Draw, female: bool) -> list[Structure]:
    rng = draw.rng
    full = float(np.exp(rng.normal(0, 0.2 * draw.variation)))
    bladder = ball(draw.near((0, 66, -262), 3), np.array([38, 34, 30]) * full)
    rectum = pipe([(-20, 8, -222), (-4, -18, -250), (0, -14, -290), (0, 2, -320)], [15, 18, 18, 13])
    parts = [
        Structure("bladder", bladder, hollow(3, "fluid", 900), 1.5, 2.0),
        Structure("rectum", rectum, hollow(4, "stool", 30), 1.5, 2.0),
    ]
    if female:
        uterus = ball(
            draw.near((0, 32, -246), 4), draw.size((27, 22, 36), 0.12), draw.turn(40, 0, 0, 10)
        )
        parts.append(Structure("uterus", uterus, flat("uterus", 6, coarse=8), 1.5, 2.0))
    else:
        gland = ball(draw.near((0, 40, -302), 2), draw.size((23, 18, 19), 0.15))
        parts.append(Structure("prostate", gland, flat("uterus", 5, -20), 1.0, 2.0))
    for side, name in ((-1, "femur_left"), (1, "femur_right")):
        ilium = cut(
            ball((side * 74, 8, -176), (58, 66, 92), rotation(-18, side * 24, 0)),
            ball((side * 68, 18, -168), (57, 66, 96), rotation(-18, side * 24, 0)),
        )
        hip = np.array([side * 92, 18, -288])
        femur = together(
            [
                ball(hip, (24, 24, 24)),
                pipe([hip, hip + (side * 44, -4, -30), hip + (side * 40, 0, -190)], [15, 21, 15]),
            ],
            8.0,
        )
        parts += [
            Structure("", ilium, flat("marrow", 40, 180), 1.5),
            Structure(name, femur, flat("marrow", 40, 140), 1.0),
        ]
    return parts
