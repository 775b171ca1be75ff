/** The sidebar tab: every training job, watched and steered. */

import { app } from "../../../scripts/app.js";
import { addToGraph } from "./add_to_graph.js";
import { showConceptsAgain } from "./concept_card.js";
import { ConceptLibrary } from "./concept_library.js";
import { refreshChoices } from "./concepts.js";
import { actionButton, element } from "./dom.js";
import { JobCard, PreparationCard } from "./job_card.js";
import * as jobs from "./jobs.js";
import { openFirstTemplate } from "./templates.js";
import { TrainingComparison } from "./training_comparison.js";
import { t } from "./words.js";

export const TAB = "custom-diffusion-trainings";

class Panel {
  constructor() {
    this.cards = new Map();
    this.active = new Set();
    this.memory = element("p", "cd-memory");
    const complain = (error) => this.complain(error);
    const begin = actionButton(t("begin"), t("beginHint"), "pi-images", openFirstTemplate, complain);
    this.empty = element("div", "cd-empty", element("p", "", t("empty")), element("div", "cd-buttons", begin));
    this.trouble = element("p", "cd-trouble");
    this.trouble.setAttribute("role", "alert");
    this.preparations = new Map(); // prompt and node → its card
    this.preparing = element("div");
    this.listing = element("div");
    this.comparison = new TrainingComparison({ onError: complain, askStepName, onTaken: () => this.#saved() });
    this.library = new ConceptLibrary({ onError: complain, addToGraph, askName, confirmBin });
    this.element = element(
      "section", "cd-panel", this.memory, this.trouble, this.empty, this.preparing, this.listing,
      this.comparison.element, this.library.element,
    );
    this.element.setAttribute("aria-label", t("title"));
    this.element.tabIndex = -1;
    jobs.listen(
      (job) => this.hear(job),
      () => this.refresh(true),
    );
    jobs.listenToPreparations((told) => this.prepare(told));
  }

  /** Shows the panel in the tab's element, and asks for all jobs. */
  open(place) {
    place.style.height = "100%";
    place.replaceChildren(this.element);
    if (this.takesFocus) requestAnimationFrame(() => this.element.focus());
    this.takesFocus = false;
    this.refresh();
  }

  /** Opens the panel and moves the keyboard's focus into it, or closes it and gives that back. */
  async toggle() {
    this.takesFocus = !this.element.isConnected;
    if (!this.takesFocus) app.canvas.canvas.focus();
    await app.extensionManager.command.execute(`Workspace.ToggleSidebarTab.${TAB}`);
  }

  /** @param {boolean} anew whether the server was away: what it prepared is over */
  async refresh(anew = false) {
    if (anew) {
      this.preparing.replaceChildren();
      this.preparations.clear();
    }
    try {
      const { jobs: all } = await jobs.list();
      const known = new Set(all.map((job) => job.id));
      for (const id of this.cards.keys()) if (!known.has(id)) this.forget(id);
      for (const job of all) this.hear(job);
      this.trouble.textContent = "";
      await this.library.refresh();
    } catch (error) {
      this.complain(error);
    }
  }

  /** A training that is no job yet. */
  prepare(told) {
    const key = `${told.prompt} ${told.node}`;
    if (!told.doing) {
      this.preparations.get(key)?.element.remove();
      this.preparations.delete(key);
      return this.tally();
    }
    if (!this.preparations.has(key)) {
      const card = new PreparationCard(told);
      this.preparations.set(key, card);
      this.preparing.append(card.element);
    }
    this.preparations.get(key).update(told);
    this.tally();
  }

  forget(id) {
    this.cards.get(id)?.element.remove();
    this.cards.delete(id);
    this.active.delete(id);
    this.tally();
  }

  /** A job, or only its id when it was deleted, maybe in another tab. */
  hear(job) {
    if (job.state === "deleted") return this.forget(job.id);
    const card = this.cards.get(job.id);
    if (card) {
      card.update(job);
    } else {
      const made = new JobCard(job, {
        onError: (error) => this.complain(error),
        onMemory: (memory) => this.tellMemory(memory),
        confirmRemoval,
        askSteps,
        askPrompt,
        askStepName,
        onTaken: () => this.#saved(),
        addToGraph: ({ concept_file }) => addToGraph(concept_file),
      });
      this.cards.set(job.id, made);
      this.listing.prepend(made.element); // the newest first
      made.update(job); // now that it can be seen
    }
    if (jobs.ACTIVE.includes(job.state)) this.active.add(job.id);
    else if (this.active.delete(job.id) && job.concept_file) this.#saved();
    this.tally();
  }

  /** A training has saved a concept. */
  #saved() {
    this.library.refresh();
    showConceptsAgain();
    refreshChoices().catch((error) => this.complain(error));
  }

  tally() {
    this.comparison.offer([...this.cards.values()].map(({ job }) => job).toReversed());
    this.empty.hidden = this.cards.size + this.preparations.size > 0;
    const tab = app.extensionManager.getSidebarTabs().find((each) => each.id === TAB);
    if (tab) tab.iconBadge = this.active.size ? String(this.active.size) : null;
  }

  tellMemory({ device, free_bytes, total_bytes }) {
    const [free, total] = [free_bytes, total_bytes].map((bytes) => (bytes / 1e9).toFixed(1));
    this.memory.textContent = t("free", { device, free, total });
  }

  complain(error) {
    this.trouble.textContent = error.message;
  }
}

async function confirmRemoval(job) {
  const kept = job.concept_file ? ` ${t("removeKept", { file: job.concept_file })}` : "";
  return app.extensionManager.dialog.confirm({
    title: t("removeTitle"),
    message: t("removeMessage", job) + kept,
    type: "delete",
  });
}

/** How many steps a job is to go on for; null when the user has thought better of it. */
async function askSteps(job) {
  const given = await app.extensionManager.dialog.prompt({
    title: t("moreTitle"),
    message: t("moreMessage", job),
    defaultValue: "100",
  });
  if (given === null) return null;
  if (!/^[1-9]\d*$/.test(given.trim())) throw new Error(t("wholeNumber", { given }));
  return Number(given);
}

/** What a sheet of a job's steps is to show; null when the user has thought better of it. */
async function askPrompt({ id, name }) {
  const [taught] = (await jobs.show(id)).concepts ?? [];
  const words = [taught?.token, taught?.class_noun].filter(Boolean).join(" ");
  return app.extensionManager.dialog.prompt({
    title: t("compareTitle"),
    message: t("compareMessage", { name }),
    defaultValue: `photo of a ${words}`,
  });
}

/** What the concept of a step is to be called; null when the user has thought better of it. */
async function askStepName({ step, name }) {
  const given = await app.extensionManager.dialog.prompt({
    title: t("takeTitle"),
    message: t("takeMessage", { step }),
    defaultValue: `${name} step ${step}`,
  });
  return given?.trim() || null;
}

/** What a concept's file is to be called; null when the user has thought better of it. */
async function askName({ name, file }) {
  const given = await app.extensionManager.dialog.prompt({
    title: t("renameTitle"),
    message: t("renameMessage", { name }),
    defaultValue: file.replace(/\.[^.]+$/, ""),
  });
  return given?.trim() || null;
}

async function confirmBin({ name }) {
  return app.extensionManager.dialog.confirm({
    title: t("binTitle"),
    message: t("binMessage", { name }),
    type: "delete",
  });
}

/** @returns {Panel} */
export function registerPanel() {
  const panel = new Panel();
  app.extensionManager.registerSidebarTab({
    id: TAB,
    icon: "pi pi-chart-line",
    iconBadge: null,
    title: t("title"),
    tooltip: t("tooltip"),
    type: "custom",
    render: (place) => panel.open(place),
  });
  panel.refresh(); // for the badge
  return panel;
}
