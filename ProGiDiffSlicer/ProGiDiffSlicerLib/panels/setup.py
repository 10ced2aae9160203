"""The setup panel: worker, model, device, packages. Nothing is installed or started unless a button is pressed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import qt
from slicer.i18n import tr as _

from progidiff.cards import Accuracy, ModelCard
from ProGiDiffSlicerLib.panels.panel import Panel
from ProGiDiffSlicerLib.setup.connection import ClientFactory, ConnectionTest, Readiness, Trial, readiness
from ProGiDiffSlicerLib.setup.install import Installer, Outcome, Remover
from ProGiDiffSlicerLib.setup.settings import DEVICES, WORKER_KINDS, Settings
from ProGiDiffSlicerLib.setup.status import Package, PythonHome, PythonStatus
from ProGiDiffSlicerLib.setup.tools import Tools
from ProGiDiffSlicerLib.signals import Signal
from ProGiDiffSlicerLib.worker.client import WorkerClient


class SetupPanel(Panel):
    """Shows how the setup stands, and changes it.

    The section around it closes by itself when everything becomes ready, and opens when something comes to be missing.

    Attributes:
        readyChanged: Signal(bool).
        workerMustStop: packages are about to change; a worker that runs has to be stopped in the slot.
    """

    def __init__(
        self,
        settings: Settings,
        section: Any,
        tools: Tools | None = None,
        client_factory: ClientFactory = WorkerClient,
        home: PythonHome | None = None,
    ) -> None:
        """``section`` is the collapsible button that holds the panel; the others are Slicer's own by default."""
        super().__init__("SetupPanel")
        self.readyChanged = Signal()
        self.workerMustStop = Signal()
        self._section = section
        self._settings = settings
        self._tools = Tools() if tools is None else tools
        self._home = PythonHome() if home is None else home
        self._installer = Installer(settings, self._tools, self._home)
        self._remover = Remover(settings, self._tools, self._home)
        self._test = ConnectionTest(settings, client_factory)
        self._readiness: Readiness | None = None
        self._tested_card: Any = None
        kinds = [_("This Slicer's Python"), _("Another Python"), _("Command (another computer)")]
        self.ui.workerKindComboBox.addItems(kinds)
        self.ui.deviceComboBox.addItems([_("Automatic"), _("CPU"), _("Graphics card (CUDA)")])
        self.ui.restartButton.setVisible(False)
        self._say("")
        self._complete = False
        self._show_settings()
        # an emptied path line tells its validity only: currentPathChanged is for paths that are not empty
        self.listen(
            (self.ui.workerKindComboBox, "currentIndexChanged(int)", self._on_kind),
            (self.ui.deviceComboBox, "currentIndexChanged(int)", self._on_device),
            (self.ui.pythonPathEdit, "currentPathChanged(QString)", self._on_python),
            (self.ui.pythonPathEdit, "validInputChanged(bool)", self._on_python),
            (self.ui.modelFolderEdit, "currentPathChanged(QString)", self._on_model),
            (self.ui.modelFolderEdit, "validInputChanged(bool)", self._on_model),
            (self.ui.wheelFolderEdit, "currentPathChanged(QString)", self._on_wheels),
            (self.ui.wheelFolderEdit, "validInputChanged(bool)", self._on_wheels),
            (self.ui.commandEdit, "editingFinished()", self._on_command),
            (self.ui.bundledButton, "clicked()", self._on_bundled),
            (self.ui.installButton, "clicked()", self._on_install),
            (self.ui.testButton, "clicked()", self._on_test),
            (self.ui.removeButton, "clicked()", self._on_remove),
            (self.ui.restartButton, "clicked()", self._on_restart),
            (settings.changed, self._on_changed),
        )
        self._test.ended.connect(self._on_tested)
        self._installer.step.connect(self._say)
        for change in (self._installer, self._remover):
            change.starting.connect(self.workerMustStop.emit)
            change.line.connect(self._on_line)
            change.ended.connect(self._on_ended)

    @property
    def ready(self) -> bool:
        """Whether everything is in place, as of the last look."""
        return self._readiness is not None and self._readiness.ready

    def cleanup(self) -> None:
        """Let go of everything outside the panel; a test that runs is ended."""
        super().cleanup()
        self._test.cleanup()
        self._installer.abandon()
        self._remover.abandon()
        self.readyChanged.clear()
        self.workerMustStop.clear()

    def refresh(self) -> None:
        """Look again at what is installed; starts nothing and imports nothing."""
        was_ready = None if self._readiness is None else self._readiness.ready
        status = self._home.status()
        self._readiness = readiness(self._settings, status)
        show_packages(self.ui.packagesTable, status)
        self._show_readiness(self._readiness)
        self._show_controls(status.ready)
        if self._installer.continues() and not self._installer.running:
            self._say(_("The installation waits for its continuation after the restart; press Continue installation."))
        if self._readiness.ready != was_ready:
            self._section.collapsed = self._readiness.ready
            self.readyChanged.emit(self._readiness.ready)

    def _show_readiness(self, found: Readiness) -> None:
        self._section.setText(_("Setup: ready") if found.ready else _("Setup"))
        self.ui.statusLabel.setText(" ".join(filter(None, (found.worker, found.model))))
        card = self._tested_card if found.card is None else found.card
        bundled = not self._settings.modelFolder
        self.ui.modelText.setText("" if card is None else model_text(card, bundled))
        self.ui.accuracySection.setVisible(card is not None and bool(card.accuracy))
        if card is not None:
            show_accuracy(self.ui.accuracyTable, card)

    def _show_settings(self) -> None:
        settings = self._settings
        self.ui.workerKindComboBox.setCurrentIndex(WORKER_KINDS.index(settings.workerKind))
        self.ui.deviceComboBox.setCurrentIndex(DEVICES.index(settings.device))
        self.ui.pythonPathEdit.setCurrentPath(settings.pythonPath)
        self.ui.modelFolderEdit.setCurrentPath(settings.modelFolder)
        self.ui.wheelFolderEdit.setCurrentPath(settings.wheelFolder)
        self.ui.commandEdit.setText(settings.commandText)

    def _show_controls(self, complete: bool | None = None) -> None:
        """Which rows there are, and which buttons can be pressed now; ``complete`` is whether nothing is left to install."""
        self._complete = self._complete if complete is None else complete
        kind = self._settings.workerKind
        rows = {
            "python": (self.ui.pythonPathLabel, self.ui.pythonPathEdit),
            "command": (self.ui.commandLabel, self.ui.commandEdit),
            "this": (self.ui.wheelFolderLabel, self.ui.wheelFolderEdit, self.ui.installButton, self.ui.packagesTable),
        }
        for name, widgets in rows.items():
            for widget in widgets:
                widget.setVisible(name == kind)
        changing = self._installer.running or self._remover.running
        busy = changing or self._test.running
        self.ui.progressBar.setVisible(busy)
        self.ui.installButton.setEnabled(not busy and not self._complete)
        self.ui.installButton.setText(_("Continue installation") if self._installer.continues() else _("Install"))
        self.ui.testButton.setEnabled(not changing)
        self.ui.testButton.setText(_("Cancel test") if self._test.running else _("Test connection"))
        self.ui.removeButton.setEnabled(not busy and self._remover.possible())
        for widget in (self.ui.workerKindComboBox, self.ui.deviceComboBox, self.ui.modelFolderEdit, self.ui.bundledButton):
            widget.setEnabled(not busy)
        for widget in (self.ui.pythonPathEdit, self.ui.commandEdit, self.ui.wheelFolderEdit):
            widget.setEnabled(not busy)

    def _say(self, sentence: str) -> None:
        self.ui.messageLabel.setText(sentence)
        self.ui.messageLabel.setVisible(bool(sentence))

    def _on_changed(self, name: str) -> None:
        if name in ("testedWorker", "device", "modelFolder", "workerKind", "pythonPath", "commandText"):
            self.refresh()

    def _on_kind(self, index: int) -> None:
        self._say("")
        self._settings.workerKind = WORKER_KINDS[index]

    def _on_device(self, index: int) -> None:
        self._settings.device = DEVICES[index]

    def _on_python(self, _told: str | bool) -> None:
        self._settings.pythonPath = self.ui.pythonPathEdit.currentPath

    def _on_model(self, _told: str | bool) -> None:
        self._settings.modelFolder = self.ui.modelFolderEdit.currentPath

    def _on_wheels(self, _told: str | bool) -> None:
        self._settings.wheelFolder = self.ui.wheelFolderEdit.currentPath

    def _on_command(self) -> None:
        self._settings.commandText = self.ui.commandEdit.text

    def _on_bundled(self) -> None:
        self.ui.modelFolderEdit.setCurrentPath("")
        self._settings.modelFolder = ""

    def _on_install(self) -> None:
        self.ui.logText.setPlainText("")
        self._installer.start()
        self._show_controls()

    def _on_line(self, line: str) -> None:
        self.ui.logText.appendPlainText(line)

    def _on_ended(self, outcome: Outcome) -> None:
        self.ui.restartButton.setVisible(outcome.kind == "restart")
        self.ui.logText.setPlainText(outcome.details)
        self.refresh()
        self._say(outcome.message)

    def _on_restart(self) -> None:
        self._tools.restart()

    def _on_test(self) -> None:
        if self._test.running:
            self._test.cancel()
            self._say(_("The test was cancelled."))
        else:
            self._say(_("Starting the worker and loading the model"))
            self._test.start()
        self._show_controls()

    def _on_tested(self, trial: Trial) -> None:
        self._tested_card = trial.card
        self.refresh()
        self._say(trial.message)
        self.ui.logText.setPlainText(trial.details)

    def _on_remove(self) -> None:
        self.ui.logText.setPlainText("")
        self._remover.start()
        self._show_controls()


def show_packages(table: Any, status: PythonStatus) -> None:
    """One row per package that the worker needs."""
    rows = [(each.need.name, each.installed, each.need.window, _state_text(each)) for each in status.packages]
    _fill(table, [_("Package"), _("Installed"), _("Needed"), _("State")], rows)


def show_accuracy(table: Any, card: ModelCard) -> None:
    """One row per data set and target, one column per metric."""
    metrics = list(dict.fromkeys(figure.metric for figure in card.accuracy))
    lines: dict[tuple[str, str], dict[str, Accuracy]] = {}
    for figure in card.accuracy:
        lines.setdefault((figure.set, figure.target), {})[figure.metric] = figure
    rows = []
    for (data_set, target), figures in lines.items():
        patients = max(figure.n_patients for figure in figures.values())
        values = [f"{figures[metric].value:.2f}" if metric in figures else "" for metric in metrics]
        rows.append((f"{data_set}, n={patients}", target, *values))
    _fill(table, [_("Patients of"), _("Target"), *metrics], rows)


def model_text(card: ModelCard, bundled: bool) -> str:
    """What the model is, in a few lines."""
    lines = [
        _("Bundled model: {name}").format(name=card.name) if bundled else card.name,
        _("Images: {modalities}. Licence: {licence}.").format(modalities=", ".join(card.modalities), licence=card.licence),
        _("Knows: {vocabulary}.").format(vocabulary=", ".join(card.vocabulary) or _("nothing yet, it is not trained")),
    ]
    return "\n".join([*lines, card.notes] if card.notes else lines)


def _state_text(package: Package) -> str:
    return {
        "ok": _("ready"),
        "missing": _("not installed"),
        "unfit": _("wrong version"),
        "damaged": _("damaged"),
    }[package.state]


def _fill(table: Any, titles: list[str], rows: Sequence[tuple[str, ...]]) -> None:
    table.setColumnCount(len(titles))
    table.setHorizontalHeaderLabels(titles)
    table.setRowCount(len(rows))
    for row, cells in enumerate(rows):
        for column, text in enumerate(cells):
            table.setItem(row, column, qt.QTableWidgetItem(text))
    table.verticalHeader().setVisible(False)
    table.resizeColumnsToContents()
    table.resizeRowsToContents()
    table.horizontalHeader().setStretchLastSection(True)
