"""``slicer.dicomDatabase``: files by the UIDs of their instances, in the memory of a test."""

from __future__ import annotations

from pathlib import Path

import pydicom

# What Python reaches of ctkDICOMDatabase: the properties and invokables that CTK dd4caeae (of Slicer 5.10) and 868d56c7 (of
# August 2026) have in common, from Libs/DICOM/Core/ctkDICOMDatabase.h. ``isOpen`` and ``databaseDirectory`` are also methods
# of C++: in Python they are properties.
_NAMES = """
databaseDirectory databaseFilename isInMemory isOpen lastError loadedSeriesInstanceUIDs patientFieldNames seriesFieldNames
studyFieldNames tagsToExcludeFromStorage tagsToPrecache useShortStoragePath
allFiles cacheTag cacheTags cachedTag cleanup closeDatabase compositePatientID connectionsInformationForPatient
descriptionForSeries descriptionForStudy descriptionsForFile displayedNameForField displayedNameForPatient fieldForPatient
fieldForSeries fieldForStudy fileExistsAndUpToDate fileForInstance fileValue fileValueExists filesForSeries formatForField
getCachedTags groupElementToTag headerKeys headerValue imagesCount initializeDatabase initializeTagCache insert
insertDateTimeForInstance insertDateTimeForPatient insertDateTimeForSeries insertDateTimeForStudy instanceForFile
instanceForURL instanceValue instanceValueExists instancesForSeries isDisplayedFieldsTableAvailable loadFileHeader
loadInstanceHeader nameForPatient openDatabase patientForStudy patients patientsCount prepareInsert removeCachedTags
removePatient removeSeries removeStudy schemaVersion schemaVersionLoaded seriesCount seriesForFile seriesForStudy
setDisplayedNameForField setFormatForField setSchemaVersion setThumbnailGenerator setVisibilityForField setWeightForField
storeThumbnailFile studiesCount studiesForPatient studyForSeries tagCacheExists tagToGroupElement thumbnailGenerator
thumbnailPathForInstance updateConnectionsForPatient updateDisplayedFields updateSchema updateSchemaIfNeeded
urlForInstance urlsForSeries visibilityForField weightForField
"""
REACHABLE = frozenset(_NAMES.split())


class DicomDatabase:
    """A database in a folder; it takes no new attributes, as no wrapped Qt object should be given any."""

    __slots__ = ("_files", "_folder", "_open")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = True
        self._files: dict[str, str] = {}

    @property
    def isOpen(self) -> bool:
        """Whether it can be asked."""
        return self._open

    @property
    def databaseDirectory(self) -> str:
        """Where it keeps its own files; below that, files leave with their entries."""
        return str(self._folder)

    def closeDatabase(self) -> None:
        """Know nothing any more."""
        self._open = False
        self._files.clear()

    def fileForInstance(self, sopInstanceUID: str) -> str:
        """The file of an instance; empty for one that it does not know."""
        return self._files.get(sopInstanceUID, "")

    def instanceForFile(self, fileName: str) -> str:
        """The instance that a file holds; empty for a file that it does not know."""
        return next((uid for uid, file in self._files.items() if file == fileName), "")

    def prepareInsert(self) -> None:
        """Forget which patients were inserted before."""

    def insert(self, filePath: str, storeFile: bool = True, generateThumbnail: bool = True) -> None:
        """Know a file where it lies; one without the UIDs of its study, series and instance is left out."""
        assert not storeFile, "copies are not made here"
        header = pydicom.dcmread(filePath, stop_before_pixels=True)
        if header.StudyInstanceUID and header.SeriesInstanceUID and header.SOPInstanceUID:
            self._files[str(header.SOPInstanceUID)] = filePath
