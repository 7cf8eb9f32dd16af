"""Synthetic faces: portraits of people who do not exist, the data that needs no download.

`_draw_person` decides what the features share; each `_render_...` draws its own details at random
and fills outlines, from the back of the image to the front. No draw depends on the image's size.

Head coordinates: a point is the complex number x + iy, x to the viewer's right, y down, 0 between
the eyes and the nose; the frame is about [-1, 1] x [-1, 1], and times exp(ia) tilts.
"""

import numpy as np
from PIL import Image, ImageDraw

# CelebA's names, in its order, and how often a man and a woman have each. A bald head has no hair
# colour, no bangs and no hat; red hair has no name.
ATTRIBUTES = tuple(
    "Bald Bangs Black_Hair Blond_Hair Brown_Hair Eyeglasses Gray_Hair Male Mouth_Slightly_Open "
    "Mustache No_Beard Rosy_Cheeks Smiling Wearing_Hat Wearing_Lipstick".split()
)
MEN = (0.22, 0.4, 0, 0, 0, 0.36, 0, 1, 0.45, 0.4, 0.5, 0.3, 0.5, 0.16, 0)
WOMEN = (0, 0.4, 0, 0, 0, 0.36, 0, 0, 0.45, 0, 1, 0.3, 0.5, 0.16, 0.62)

# A colour is a mixture of two from its row; the darkest and the brightest of each hair are apart.
HAIRS = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair", "Red_Hair")
HAIRS_DARK = ((16, 14, 18), (222, 176, 80), (80, 44, 22), (146, 148, 156), (168, 62, 22))
HAIRS_BRIGHT = ((38, 32, 36), (250, 220, 132), (118, 70, 36), (206, 206, 212), (206, 92, 36))
SKINS = ((255, 226, 204), (246, 208, 178), (226, 174, 134), (190, 134, 96), (138, 92, 66))
IRISES = ((56, 32, 20), (40, 80, 126), (46, 96, 64), (74, 84, 92))
LIPSTICKS = ((206, 16, 44), (224, 36, 112))
BACKDROPS = ((84, 120, 172), (126, 172, 160), (182, 150, 190), (196, 204, 216), (72, 92, 104))
CLOTHES = ((30, 64, 160), (176, 30, 52), (20, 118, 92), (108, 44, 134))
DARK, WHITE, BLUSH = (34, 18, 20), (250, 248, 246), (224, 48, 64)

CIRCLE = np.exp(2j * np.pi * np.arange(40) / 40)  # clockwise on the screen, from the right
BOX = CIRCLE / (CIRCLE.real**4 + CIRCLE.imag**4) ** 0.25
ACROSS = np.linspace(-1, 1, 15)
ARCH, BOW = 1 - abs(ACROSS) ** 2.5, ACROSS**2
# What a lens is made of, upper and lower edge: width, upper arc, lower arc, lift of the corners.
UPPER, LOWER = (ACROSS, -1j * ARCH, 0 * BOW, -1j * BOW), (-ACROSS, 0 * BOW, 1j * ARCH, -1j * BOW)
LENS = np.concatenate([UPPER, LOWER], axis=1)


def _mix(a, b, weight):
    """Return the colour on the way from `a` (weight 0) to `b` (weight 1)."""
    return tuple([int(p + (q - p) * weight + 0.5) for p, q in zip(a, b, strict=True)])


def _oval(centre, rx, ry, shape=CIRCLE):
    return centre + rx * shape.real + 1j * ry * shape.imag


def _lens(centre, half_width, above, below, lift=0.0, tilt=0.0):
    """Outline two arcs that reach `above` and `below` the centre and meet in lifted corners."""
    return centre + (1 + 1j * tilt) * (np.array((half_width, above, below, lift)) @ LENS)


class _Face:
    """All that is random about one face, and a canvas that is filled in head coordinates."""

    def __init__(self, index, seed):
        self.draws = iter(np.random.default_rng([seed, index]).random(128).tolist())
        self.backdrop = self.tint(BACKDROPS), self.tint(BACKDROPS)
        self.scale, self.tilt = self.draw(0.96, 1.1), np.exp(1j * self.draw(-0.1, 0.1))
        self.centre = complex(self.draw(0.93, 1.07), self.draw(0.95, 1.05))
        _draw_person(self)

    def start(self, size):
        """Begin an image of size x size."""
        backdrop = np.linspace(*self.backdrop, size).astype(np.uint8)
        self.canvas = Image.fromarray(backdrop[:, None]).resize((size, size), Image.NEAREST)
        self.opaque, self.glaze = ImageDraw.Draw(self.canvas), ImageDraw.Draw(self.canvas, "RGBA")
        self.rings = max(3, size // 48)  # the steps of a soft edge
        self.zoom, self.origin = size / 2 * self.scale * self.tilt, size / 2 * self.centre

    @property
    def attributes(self):
        return np.array([1 if self.has[name] else -1 for name in ATTRIBUTES], np.int8)

    def draw(self, low=0.0, high=1.0):
        return low + (high - low) * next(self.draws)

    def tint(self, row):
        first, step = int(self.draw(0, len(row))), int(self.draw(1, len(row)))
        return _mix(row[first], row[(first + step) % len(row)], self.draw())

    def fill(self, outline, colour, strength=1.0):
        points = (outline * self.zoom + self.origin).view(np.float64).tolist()
        pen = self.opaque if strength == 1 else self.glaze
        pen.polygon(points, (*colour, round(255 * strength)))

    def soft(self, outline, centre, colour, strength, core=0.3):
        """Fade in rings from the outline to full strength where it has shrunk to `core`."""
        layer = 1 - (1 - strength) ** (1 / self.rings)
        for ring in range(self.rings):
            width = 1 - (1 - core) * ring / (self.rings - 1)
            self.fill(centre + width * (outline - centre), colour, layer)


def _draw_person(face):
    male = face.male = face.draw() < 0.5
    shares = zip(ATTRIBUTES, MEN if male else WOMEN, strict=True)
    has = face.has = {name: face.draw() < share for name, share in shares}
    hair = int(np.searchsorted((0.27, 0.52, 0.75, 0.9), face.draw()))
    has[HAIRS[hair]] = True
    if has["Bald"]:
        has[HAIRS[hair]] = has["Bangs"] = has["Wearing_Hat"] = False
    face.hair, face.skin = _mix(HAIRS_DARK[hair], HAIRS_BRIGHT[hair], face.draw()), face.tint(SKINS)
    face.long = face.draw() < (0 if has["Bald"] else 0.08 if male else 0.85)
    face.curl = 1 + face.draw(0, 0.03) * np.cos(2 * int(face.draw(5, 9)) * np.angle(CIRCLE))
    face.shade = _mix(face.skin, (84, 30, 30), 0.34)
    face.light = complex(face.draw(-1, 1), face.draw(-0.6, 0.1))
    face.side, face.volume = face.draw(-0.09, 0.09), face.draw(0.02, 0.18)  # side: the head's turn
    face.width, face.height = face.draw(0.56, 0.62) + 0.04 * male, face.draw(0.72, 0.8)
    chin = face.draw(0.05, 0.14) if male else face.draw(0.2, 0.3)  # how pointed it is
    face.head = _oval(0.02j, face.width * (1 - chin * CIRCLE.imag.clip(0) ** 2), face.height)


def _render_head(face):
    """Render all that lies behind the features: hair, shoulders, neck, ears, skin, beard."""
    if face.long:
        locks = _oval(0, face.width + 0.1 + 0.7 * face.volume, face.height, (CIRCLE + BOX) / 2)
        locks.imag[:21] *= face.draw(0.6, 1.8)
        face.fill(locks * face.curl, _mix(face.hair, DARK, 0.18))
    face.fill(_oval(1.32j, 0.95, 0.45), _mix(face.tint(CLOTHES), DARK, 0.3))
    face.fill(_oval(0.75j, 0.31, 0.4, BOX), face.shade)
    for ear in () if face.long else (-face.width, face.width):
        face.fill(_oval(ear - 0.5 * face.side + 0.05j, 0.1, 0.16), face.shade)
    face.fill(face.head, _mix(face.skin, face.shade, 0.5))
    face.soft(face.head, face.side + 0.24 * face.light, face.skin, 0.9, 0.5)
    for cheek in (0.27j - 0.33, 0.27j + 0.33) if face.has["Rosy_Cheeks"] else ():
        face.soft(_oval(cheek + face.side, 0.2, 0.16), cheek + face.side, BLUSH, 0.55)
    if not face.has["No_Beard"]:
        edge = 0.97 * face.width * ACROSS + 1j * (0.06 + face.draw(0.3, 0.42) * (1 - BOW**3))
        face.fill(np.append(face.head[:21], edge), _mix(face.hair, DARK, 0.35))


def _render_eyes(face):
    face.eyes = complex(face.draw(0.235, 0.275), face.draw(-0.07, 0))
    width, height, slant = face.draw(0.125, 0.155), face.draw(0.085, 0.115), face.draw(-0.12, 0.12)
    gaze, iris, frown = face.draw(-0.03, 0.03), face.tint(IRISES), face.draw(-0.12, 0.16)
    lash, brow = (1.2, face.draw(0.06, 0.085)) if face.male else (1.5, face.draw(0.045, 0.06))
    for sign in (-1, 1):
        eye = sign * face.eyes.real + face.side + 1j * face.eyes.imag
        half, tilt = width * (1 - 1.3 * sign * face.side), -slant * sign
        face.fill(_lens(eye, half, height, 0.85 * height, 0, tilt), WHITE)
        face.fill(eye + gaze + 0.92 * height * CIRCLE[::2], iris)
        face.fill(eye + gaze + 0.5 * height * CIRCLE[::2], DARK)
        face.fill(eye + gaze + height * (0.3 - 0.3j + 0.2 * CIRCLE[::4]), WHITE)
        face.fill(_lens(eye, 1.15 * half, lash * height, -0.85 * height, 0, tilt), DARK)
        eye -= 0.2j + 0.3j * height
        face.fill(_lens(eye, 1.3 * half, brow, 0, -0.04, sign * frown), _mix(face.hair, DARK, 0.5))


def _render_nose_and_mouth(face):
    nose, width = 1.5 * face.side + 1j * face.draw(0.2, 0.27), face.draw(0.07, 0.12)
    away = np.copysign(0.4 * width, -face.light.real)  # the side in the shade
    face.fill(_oval(nose + away - 1j * width, 0.35 * width, 1.3 * width), face.shade, 0.45)
    face.fill(_lens(nose, 1.15 * width, 0.02, 0.6 * width), face.shade, 0.8)
    smiling, painted = face.has["Smiling"], face.has["Wearing_Lipstick"]
    lift, half = (face.draw(0.13, 0.17), 0.28) if smiling else (face.draw(-0.07, 0), 0.23)
    mouth = 1.15 * face.side + 1j * (face.draw(0.45, 0.5) + 0.4 * max(lift, 0))
    half, lip = half * face.draw(0.85, 1.05), face.draw(0.03, 0.045) + 0.02 * painted
    colour = face.tint(LIPSTICKS) if painted else _mix(face.skin, (150, 40, 48), 0.5)
    gap = face.draw(0.055, 0.085) if face.has["Mouth_Slightly_Open"] else 0.02
    up, down = gap * (0.1 if smiling else 0.9), gap * 1.4
    face.fill(_lens(mouth, half, lip + up, lip + down, lift), colour)
    face.fill(_lens(mouth, 0.9 * half, up, down, 0.9 * lift), (58, 12, 18))
    if face.has["Mouth_Slightly_Open"]:
        face.fill(_lens(mouth, 0.76 * half, up, 0.4 * down - 0.5 * up, 0.8 * lift), WHITE)
    if face.has["Mustache"]:
        face.fill(_lens(mouth.real + 0.4j, 0.27, 0.07, 0.02, -0.07), _mix(face.hair, DARK, 0.45))


def _render_hair(face):
    """Render the hair in front: a cap down to the hairline, bangs and a shine."""
    if face.has["Bald"]:
        return face.soft(_oval(-0.5j + 0.3 * face.light.real, 0.2, 0.1), -0.5j, WHITE, 0.4)
    rx, ry = face.width + 0.05 + 0.6 * face.volume, face.height + 0.06 + face.volume
    cap = np.roll(_oval(0.02j, rx, ry) * face.curl, 21)[:23]  # a little more than the upper half
    line, parting, bend = face.draw(0.42, 0.52), face.draw(-0.35, 0.35), 1 - BOW
    fall = abs(ACROSS - parting * bend) ** 4 * (line + 0.1)
    hairline = 0.94 * face.width * ACROSS + 0.6 * face.side * bend + 1j * (fall - line)
    face.fill(np.append(hairline, (hairline + 0.07j * ARCH)[::-1]), face.shade, 0.5)
    face.fill(np.append(cap, hairline[::-1]), face.hair)
    if face.has["Bangs"]:
        edge = 0.04 * BOW + face.draw(-0.05, 0.05) * ACROSS - face.draw(0.25, 0.3)
        top = hairline.real - 1j * (0.35 + 0.25 * ARCH)
        face.fill(np.append(hairline.real + 1j * edge, top[::-1]), face.hair)
    shine = 0.15 * face.light.real - 1j * (face.height - 0.04)
    face.soft(_lens(shine, 0.34, 0.1, 0.03, -0.1), shine, _mix(face.hair, WHITE, 0.6), 0.35)


def _render_hat_and_glasses(face):
    if face.has["Wearing_Hat"]:
        crown = _oval(-0.5j, face.width + 0.1, face.draw(0.4, 0.55), (CIRCLE + BOX) / 2)
        hat, crown.imag = face.tint(CLOTHES), np.minimum(crown.imag, -0.4)
        face.fill(crown, hat)
        face.fill(_lens(-0.52j, face.width + 0.14, 0.16, 0.02, -0.1), _mix(hat, DARK, 0.45))
    if face.has["Eyeglasses"]:
        rim, height = face.draw(0.2, 0.235), face.draw(0.155, 0.2)
        loop = np.append(CIRCLE, 1) + face.draw() * np.append(BOX - CIRCLE, 0)
        middle, frame = face.side + 1j * face.eyes.imag, _mix(face.tint(CLOTHES), DARK, 0.8)
        for sign in (-1, 1):
            glass = middle + 0.02j + sign * max(face.eyes.real, rim + 0.03)
            inside = _oval(glass, rim - 0.06, height - 0.06, loop[::-1])
            face.fill(np.append(_oval(glass, rim, height, loop), inside), frame)
            hinge, ear = glass + sign * (rim - 0.02), sign * face.width + 1j * glass.imag
            face.fill(np.array([hinge - 0.03j, ear - 0.03j, ear + 0.03j, hinge + 0.03j]), frame)
        face.fill(_lens(middle, 0.1, 0.06, 0, -0.02), frame)


def face_attributes(index: int, seed: int = 0) -> np.ndarray:
    """Return what face `index` of `seed` shows, in the order of ATTRIBUTES: (15,) int8 of 1 (has
    it) or -1 (has it not)."""
    return _Face(index, seed).attributes


def render_face(index: int, img_size: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Render face `index` of the endless row of faces of `seed`; another img_size shows the same
    person.

    img_size: 8 or more. Returns the image, (img_size, img_size, 3) uint8 RGB, and its
    `face_attributes`."""
    assert index >= 0, f"index must be 0 or more, got {index}"
    assert img_size >= 8, f"img_size must be 8 or more, got {img_size}"
    # Render several times too large; the reduction at the end smooths the edges.
    factor = 4 if img_size < 64 else 3
    face = _Face(index, seed)
    face.start(img_size * factor)
    _render_head(face)
    _render_eyes(face)
    _render_nose_and_mouth(face)
    _render_hair(face)
    _render_hat_and_glasses(face)

    # Light falls from one side and fades towards the corners.
    x = ((2 * np.arange(img_size, dtype=np.float32) + 1) / img_size - 1)[:, None]
    y = x[:, None]
    light = 1.04 + 0.1 * (face.light.real * x + face.light.imag * y) - 0.07 * (x * x + y * y)
    pixels = (np.asarray(face.canvas.reduce(factor)) * light + 0.5).clip(0, 255).astype(np.uint8)
    return pixels, face.attributes
