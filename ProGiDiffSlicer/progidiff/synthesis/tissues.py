"""The tissue classes that synthetic images are painted with, what each looks like on CT and MR, and the targets they make.

A label map of any source (atlas, TotalSegmentator, Visible Human, procedural phantom) is first translated into these
classes; painting knows nothing else. Attenuation follows common abdominal CT references; the MR signals are relative ones,
between 0 (dark) and 1 (bright), as abdominal sequences at 1.5 and 3 T show them.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Names of the four CT phases of :attr:`Tissue.hu`.
PHASES = ("unenhanced", "arterial", "portal venous", "late")
#: Names of the five MR looks of :attr:`Tissue.signal`.
SEQUENCES = ("T1", "T1 fat-suppressed, enhanced", "T1 opposed phase", "T2", "T2 fat-suppressed")


@dataclass(frozen=True)
class Tissue:
    """How one class looks.

    Attributes:
        name: name of the class.
        hu: mean attenuation in HU per phase of :data:`PHASES`.
        spread: deviation between patients, HU.
        signal: mean MR signal per look of :data:`SEQUENCES`, 0 to 1.
        uneven: deviation between the parts of one patient's tissue, HU.
    """

    name: str
    hu: tuple[float, float, float, float]
    spread: float
    signal: tuple[float, float, float, float, float]
    uneven: float = 8.0


#: The first nine are the targets of the phantoms; the next seven are targets as well.
TISSUES: tuple[Tissue, ...] = (
    Tissue("unlabelled", (-100, -100, -100, -100), 10, (0.85, 0.2, 0.8, 0.75, 0.15), 12),  # fat
    Tissue("liver", (58, 70, 108, 95), 20, (0.55, 0.6, 0.5, 0.3, 0.3)),
    Tissue("spleen", (48, 115, 120, 100), 20, (0.35, 0.65, 0.35, 0.6, 0.65), 10),
    Tissue("right kidney", (34, 165, 190, 175), 40, (0.4, 0.8, 0.38, 0.7, 0.7), 16),
    Tissue("left kidney", (34, 165, 190, 175), 40, (0.4, 0.8, 0.38, 0.7, 0.7), 16),
    Tissue("pancreas", (40, 100, 90, 75), 20, (0.6, 0.65, 0.5, 0.42, 0.4), 12),
    Tissue("stomach", (30, 45, 45, 45), 30, (0.3, 0.35, 0.3, 0.6, 0.6), 25),
    Tissue("gallbladder", (10, 10, 12, 14), 12, (0.35, 0.3, 0.35, 0.95, 0.95), 5),
    Tissue("aorta", (42, 300, 150, 115), 35, (0.2, 0.9, 0.2, 0.12, 0.12), 8),
    Tissue("inferior vena cava", (40, 80, 130, 115), 28, (0.25, 0.8, 0.25, 0.2, 0.2), 14),
    Tissue("duodenum", (30, 55, 60, 55), 28, (0.35, 0.45, 0.35, 0.55, 0.55), 22),
    Tissue("esophagus", (38, 55, 62, 58), 15, (0.35, 0.5, 0.35, 0.45, 0.45), 14),
    Tissue("right adrenal gland", (25, 70, 70, 55), 15, (0.45, 0.55, 0.35, 0.45, 0.45)),
    Tissue("left adrenal gland", (25, 70, 70, 55), 15, (0.45, 0.55, 0.35, 0.45, 0.45)),
    Tissue("urinary bladder", (6, 8, 10, 60), 12, (0.2, 0.2, 0.2, 0.97, 0.97), 6),
    Tissue("colon", (25, 35, 40, 40), 40, (0.4, 0.4, 0.4, 0.45, 0.4), 45),
    Tissue("small bowel", (28, 55, 60, 55), 28, (0.35, 0.5, 0.35, 0.55, 0.55), 30),
    Tissue("lung", (-850, -845, -840, -845), 40, (0.05, 0.06, 0.05, 0.06, 0.07), 25),
    Tissue("heart", (42, 200, 140, 120), 40, (0.3, 0.75, 0.3, 0.3, 0.35), 30),
    Tissue("vertebra", (220, 225, 230, 225), 60, (0.6, 0.3, 0.5, 0.45, 0.25), 50),
    Tissue("iliopsoas", (55, 58, 64, 62), 9, (0.35, 0.35, 0.35, 0.2, 0.22), 6),
    Tissue("portal vein", (40, 75, 160, 120), 30, (0.25, 0.85, 0.25, 0.2, 0.2)),
    Tissue("bone", (330, 335, 340, 335), 110, (0.4, 0.2, 0.35, 0.35, 0.2), 90),
    Tissue("disc", (80, 80, 85, 84), 20, (0.35, 0.3, 0.35, 0.5, 0.5), 12),
    Tissue("muscle", (54, 58, 63, 61), 9, (0.35, 0.35, 0.35, 0.2, 0.22), 9),
    Tissue("bowel", (28, 45, 50, 48), 35, (0.38, 0.45, 0.38, 0.5, 0.5), 38),
    Tissue("artery", (42, 290, 150, 115), 45, (0.2, 0.85, 0.2, 0.15, 0.15)),
    Tissue("vein", (40, 85, 140, 115), 35, (0.25, 0.8, 0.25, 0.2, 0.2)),
    Tissue("spinal cord", (30, 34, 36, 35), 10, (0.45, 0.4, 0.45, 0.7, 0.7), 6),
    Tissue("fluid", (8, 8, 10, 12), 8, (0.2, 0.18, 0.2, 0.97, 0.97), 4),
    Tissue("airway", (-960, -960, -960, -960), 25, (0.02, 0.02, 0.02, 0.02, 0.02), 8),
    Tissue("other", (45, 60, 65, 60), 30, (0.4, 0.5, 0.4, 0.45, 0.45), 20),
)
INDEX = {tissue.name: i for i, tissue in enumerate(TISSUES)}
COUNT = len(TISSUES)

#: Targets by the tissues that make them, in the order of the bundled model's vocabulary.
TARGETS: dict[str, tuple[str, ...]] = {
    **{tissue.name: (tissue.name,) for tissue in TISSUES[1:10]},
    "kidneys": ("right kidney", "left kidney"),
    **{tissue.name: (tissue.name,) for tissue in TISSUES[10:17]},
    "lungs": ("lung",),
    "heart": ("heart",),
    "spine": ("vertebra",),
    "iliopsoas muscles": ("iliopsoas",),
    "portal vein and splenic vein": ("portal vein",),
}
#: Targets that are painted, and small or rare enough that the bundled model has not learned to find them.
_NOT_LEARNED = frozenset(
    {"esophagus", "right adrenal gland", "left adrenal gland", "urinary bladder", "portal vein and splenic vein"}
)
#: Vocabulary of the bundled model.
VOCABULARY = tuple(name for name in TARGETS if name not in _NOT_LEARNED)
#: Targets that the procedural phantoms draw: the first nine tissues, and the union of the kidneys.
ORGANS = VOCABULARY[:9]
PHANTOM_TARGETS = frozenset({*ORGANS, "kidneys"})

#: First match wins: words in a source's label name, and the class they mean.
_WORDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("right_kidney", "kidney_right", "right_renal_pelvis"), "right kidney"),
    (("left_kidney", "kidney_left", "left_renal_pelvis"), "left kidney"),
    (("portal_vein_and_splenic",), "portal vein"),
    (("portal", "splenic_vein", "renal_vein", "hepatic_vein", "iliac_vein", "iliac_vena", "mesenteric_vein",
      "superior_vena_cava", "brachiocephalic_vein", "pulmonary_vein"), "vein"),
    (("celiac", "artery", "brachiocephalic_trunk"), "artery"),
    (("inferior_vena_cava",), "inferior vena cava"),
    (("aorta",), "aorta"),
    (("liver",), "liver"),
    (("spleen",), "spleen"),
    (("pancreas",), "pancreas"),
    (("stomach",), "stomach"),
    (("gallbladder",), "gallbladder"),
    (("duodenum",), "duodenum"),
    (("intervertebral", "disc"), "disc"),
    (("spinal_cord",), "spinal cord"),
    (("adrenal_gland_right", "right_adrenal"), "right adrenal gland"),
    (("adrenal_gland_left", "left_adrenal"), "left adrenal gland"),
    (("trachea",), "airway"),
    (("lung",), "lung"),
    (("esophagus",), "esophagus"),
    (("heart", "atrial_appendage", "atrium", "ventricle", "myocardium"), "heart"),
    (("urinary_bladder",), "urinary bladder"),
    (("cyst",), "fluid"),
    (("small_bowel",), "small bowel"),
    (("colon_and_ileum", "bowel"), "bowel"),
    (("colon",), "colon"),
    (("psoas", "iliacus"), "iliopsoas"),
    (("muscle", "autochthon", "gluteus", "erector"), "muscle"),
    (("vertebra", "lumbar", "thoracic", "cervical"), "vertebra"),
    (("rib", "sacrum", "pelvis", "hip", "bone", "femur", "coccyx", "sternum", "costal", "scapula", "humerus", "clavicula",
      "skull"), "bone"),
)  # fmt: skip


def tissue_of(label_name: str) -> int:
    """Tissue index of a label by its name (English, snake case as in TotalSegmentator and the SPL atlas)."""
    name = label_name.strip().lower().replace(" ", "_")
    for words, tissue in _WORDS:
        if any(word in name for word in words):
            return INDEX[tissue]
    return INDEX["other"]
