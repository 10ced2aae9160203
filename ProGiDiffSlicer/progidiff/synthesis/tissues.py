"""The tissue classes that synthetic images are painted with, and what each looks like on CT.

A label map of any source (atlas, TotalSegmentator output, procedural phantom) is first translated into these classes;
painting knows nothing else. Mean attenuation values follow common abdominal CT references (unenhanced, late arterial and
portal venous phase).
"""

from __future__ import annotations

from dataclasses import dataclass

#: Canonical target names, in the order of their tissue index (1-based). "kidneys", the union of both, has no index.
ORGANS = (
    "liver",
    "spleen",
    "right kidney",
    "left kidney",
    "pancreas",
    "stomach",
    "gallbladder",
    "aorta",
    "inferior vena cava",
)
#: Vocabulary of the bundled model.
VOCABULARY = (*ORGANS, "kidneys")


@dataclass(frozen=True)
class Tissue:
    """Attenuation of one class: mean per phase (unenhanced, arterial, portal venous) and spread between patients, in HU."""

    name: str
    hu: tuple[float, float, float]
    spread: float


TISSUES: tuple[Tissue, ...] = (
    Tissue("unlabelled", (-100, -100, -100), 10),
    Tissue("liver", (58, 70, 108), 22),
    Tissue("spleen", (50, 115, 120), 22),
    Tissue("right kidney", (34, 185, 195), 50),
    Tissue("left kidney", (34, 185, 195), 50),
    Tissue("pancreas", (42, 100, 90), 20),
    Tissue("stomach", (30, 45, 45), 30),
    Tissue("gallbladder", (12, 10, 12), 12),
    Tissue("aorta", (42, 300, 155), 35),
    Tissue("inferior vena cava", (40, 85, 140), 30),
    Tissue("bone", (300, 320, 330), 110),
    Tissue("disc", (80, 80, 85), 20),
    Tissue("muscle", (52, 58, 62), 10),
    Tissue("bowel", (30, 50, 50), 35),
    Tissue("artery", (42, 290, 150), 45),
    Tissue("vein", (42, 90, 150), 35),
    Tissue("lung", (-850, -850, -840), 40),
    Tissue("adrenal", (30, 70, 65), 15),
    Tissue("esophagus", (40, 55, 60), 15),
    Tissue("duodenum", (30, 50, 55), 30),
    Tissue("heart", (45, 220, 150), 45),
    Tissue("spinal cord", (30, 35, 38), 10),
    Tissue("fluid", (8, 8, 10), 8),
    Tissue("other", (45, 60, 60), 30),
)
INDEX = {tissue.name: i for i, tissue in enumerate(TISSUES)}

#: First match wins: words in a source's label name, and the class they mean.
_WORDS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("right_kidney", "kidney_right", "right_renal_pelvis"), "right kidney"),
    (("left_kidney", "kidney_left", "left_renal_pelvis"), "left kidney"),
    (("portal", "splenic_vein", "renal_vein", "hepatic_vein", "iliac_vein", "iliac_vena", "mesenteric_vein"), "vein"),
    (("celiac", "artery", "iliac_artery"), "artery"),
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
    (("lung",), "lung"),
    (("adrenal",), "adrenal"),
    (("esophagus",), "esophagus"),
    (("heart",), "heart"),
    (("urinary_bladder", "cyst"), "fluid"),
    (("colon", "bowel", "ileum"), "bowel"),
    (("muscle", "psoas", "iliopsoas", "autochthon", "gluteus", "erector"), "muscle"),
    (("vertebra", "lumbar", "thoracic", "cervical", "rib", "sacrum", "pelvis", "hip", "bone", "femur", "coccyx", "sternum",
      "costal", "scapula", "humerus"), "bone"),
)  # fmt: skip


def tissue_of(label_name: str) -> int:
    """Tissue index of a label by its name (English, snake case as in TotalSegmentator and the SPL atlas)."""
    name = label_name.strip().lower().replace(" ", "_")
    for words, tissue in _WORDS:
        if any(word in name for word in words):
            return INDEX[tissue]
    return INDEX["other"]
