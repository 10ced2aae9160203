"""Terminology files that Slicer's logic wants to read at its start; slicer-core ships none."""

from __future__ import annotations

import json
from pathlib import Path

_TISSUE = {"CodingSchemeDesignator": "SCT", "CodeValue": "85756007", "CodeMeaning": "Tissue"}
_TORSO = {"CodingSchemeDesignator": "SCT", "CodeValue": "22943007", "CodeMeaning": "Trunk"}


def folder_without_terms(folder: Path) -> Path:
    """Write lists that hold a single generic entry into ``folder``, so that the logic starts without complaints."""
    for name in ("SlicerGeneralAnatomy", "DICOM-Master"):
        context = {
            "SegmentationCategoryTypeContextName": f"Segmentation category and type - {name}",
            "@schema": "https://raw.githubusercontent.com/qiicr/dcmqi/master/doc/segment-context-schema.json#",
            "SegmentationCodes": {
                "Category": [
                    _TISSUE | {"showAnatomy": True, "Type": [_TISSUE | {"recommendedDisplayRGBValue": [128, 174, 128]}]},
                ]
            },
        }
        (folder / f"SegmentationCategoryTypeModifier-{name}.term.json").write_text(json.dumps(context), encoding="utf-8")
    regions = {
        "AnatomicContextName": "Anatomic codes - DICOM master list",
        "@schema": "https://raw.githubusercontent.com/qiicr/dcmqi/master/doc/anatomic-context-schema.json#",
        "AnatomicCodes": {"AnatomicRegion": [_TORSO]},
    }
    (folder / "AnatomicRegionAndModifier-DICOM-Master.term.json").write_text(json.dumps(regions), encoding="utf-8")
    return folder
