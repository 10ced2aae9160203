"""``slicer.app.coreIOManager()``: reading and writing through the real storage nodes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import slicer

from .stand_ins import stands_for

_EXTENSIONS = (".seg.nrrd", ".nii.gz", ".mrk.json", ".seq.nrrd", ".nrrd", ".nii", ".mha", ".mrb", ".mrml", ".h5", ".tfm")


@stands_for("qSlicerIOManager")
class CoreIOManager:
    """As much of ``qSlicerCoreIOManager`` as ``slicer.util``'s functions for loading and saving use."""

    def __init__(self, scene: Any) -> None:
        self._scene = scene

    def fileType(self, fileName: Any) -> str:
        """What kind of file a name stands for."""
        name = str(fileName).lower()
        for ending, kind in (
            (".mrb", "SceneFile"),
            (".mrml", "SceneFile"),
            (".mrk.json", "MarkupsFile"),
            (".tfm", "TransformFile"),
        ):
            if name.endswith(ending):
                return kind
        return "SegmentationFile" if ".seg." in name else "SequenceFile" if ".seq." in name else "VolumeFile"

    def fileWriterFileType(self, node: Any, fileName: Any = "") -> str:
        """What kind of file a node is written to."""
        return "NodeFile"

    def fileWriterExtensions(self, node: Any) -> list[str]:
        """The formats a node can be exported to."""
        if node.IsA("vtkMRMLSegmentationNode"):
            return ["Segmentation (.seg.nrrd)", "Segmentation (.nrrd)"]
        return ["NRRD (.nrrd)", "NIfTI (.nii.gz)", "NIfTI (.nii)", "Markups (.mrk.json)"]

    def extractKnownExtension(self, fileName: Any, node: Any) -> str:
        """The ending of a name, double ones included."""
        return next((each for each in _EXTENSIONS if str(fileName).endswith(each)), "")

    def loadNodes(self, fileType: str, properties: dict[str, Any], nodes: Any = None, messages: Any = None) -> bool:
        """Load one file; the nodes go into ``nodes`` (a ``vtkCollection``)."""
        path = properties["fileName"]
        name = properties.get("name") or Path(path).name.split(".")[0]
        if not os.path.exists(path):
            return False
        if fileType == "SceneFile":
            return self._load_scene(path, properties.get("clear", True), messages)
        node = self._load_node(fileType, path, name, properties)
        if node is not None and nodes is not None:
            nodes.AddItem(node)
        return node is not None

    def _load_scene(self, path: str, clear: bool, messages: Any) -> bool:
        if path.endswith(".mrb"):
            return bool(self._scene.ReadFromMRB(path, clear, messages))
        self._scene.SetURL(path)
        return bool(self._scene.Connect() if clear else self._scene.Import())

    def _load_node(self, kind: str, path: str, name: str, properties: dict[str, Any]) -> Any:
        if kind == "VolumeFile":
            return slicer.modules.volumes.logic().AddArchetypeVolume(path, name, 1 if properties.get("labelmap") else 0)
        if kind == "SegmentationFile":
            return slicer.modules.segmentations.logic().LoadSegmentationFromFile(path, True, name)
        if kind == "SequenceFile":
            return slicer.modules.sequences.logic().AddSequence(path)
        if kind == "TransformFile":
            return slicer.modules.transforms.logic().AddTransform(path, self._scene)
        storage = self._scene.AddNewNodeByClass("vtkMRMLMarkupsJsonStorageNode")
        storage.SetFileName(path)
        node = self._scene.AddNewNodeByClass("vtkMRMLMarkupsFiducialNode", name)
        if not storage.ReadData(node):
            self._scene.RemoveNode(node)
            self._scene.RemoveNode(storage)
            return None
        node.SetAndObserveStorageNodeID(storage.GetID())
        node.CreateDefaultDisplayNodes()
        return node

    def saveNodes(self, fileType: str, properties: dict[str, Any], messages: Any = None, scene: Any = None) -> bool:
        """Write the scene or one node.

        Raises:
            TypeError: the file name is no ``str`` (Qt cannot convert a path object).
        """
        path = properties["fileName"]
        if not isinstance(path, str):
            raise TypeError("fileName must be str: Qt cannot convert a path object")
        if fileType == "SceneFile":
            self._scene.SetURL(path)
            self._scene.SetRootDirectory(os.path.dirname(path))
            return bool(self._scene.WriteToMRB(path) if path.endswith(".mrb") else self._scene.Commit(path))
        node = self._scene.GetNodeByID(properties["nodeID"])
        node.AddDefaultStorageNode()
        storage = node.GetStorageNode()
        storage.SetFileName(path)
        return bool(storage.WriteData(node))

    def exportNodes(
        self, nodeIDs: Any, fileNames: Any, properties: Any, hardenTransform: bool, messages: Any = None
    ) -> bool:
        """Write nodes without changing their storage nodes."""
        for node_id, path in zip(nodeIDs, fileNames, strict=True):
            node = self._scene.GetNodeByID(node_id)
            storage = node.CreateDefaultStorageNode()
            storage.SetScene(self._scene)
            storage.SetFileName(str(path))
            written = storage.WriteData(node)
            storage.UnRegister(None)
            if not written:
                return False
        return True
