/** The sidebar tab "Trainings": every training job, watched and steered. */

import { app } from "../../../scripts/app.js";
import { JobCard } from "./job_card.js";
import * as jobs from "./jobs.js";

const TAB = "custom-diffusion-trainings";
const EMPTY =
  "No training yet. Put 4 to 20 pictures into a folder below ComfyUI/input, open the template " +
  "“merge_two_concepts” of this pack, choose the folder and your checkpoint, and run it.";

class Panel {
  constructor() {
    this.cards = new Map();
    this.element = document.createElement("section");
    this.element.className = "cd-panel";
    this.element.setAttribute("aria-label", "Trainings");
    this.empty = document.createElement("p");
    this.empty.className = "cd-empty";
    this.empty.textContent = EMPTY;
    this.trouble = document.createElement("p");
    this.trouble.className = "cd-trouble";
    this.trouble.setAttribute("role", "alert");
    this.listing = document.createElement("div");
    this.element.append(this.trouble, this.empty, this.listing);
    this.active = new Set();
    jobs.listen(
      (job) => this.hear(job),
      () => this.refresh(),
    );
  }

  /** Shows the panel in the tab's element, and asks for all jobs. */
  open(place) {
    place.style.height = "100%";
    place.replaceChildren(this.element);
    this.refresh();
  }

  async refresh() {
    try {
      const { jobs: all } = await jobs.list();
      const known = new Set(all.map((job) => job.id));
      for (const id of [...this.cards.keys()]) if (!known.has(id)) this.forget(id);
      for (const job of all) this.hear(job);
      this.trouble.textContent = "";
    } catch (error) {
      this.complain(error);
    }
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
        confirmRemoval,
        addToGraph,
      });
      this.cards.set(job.id, made);
      this.listing.prepend(made.element); // the newest first
    }
    if (jobs.ACTIVE.includes(job.state)) this.active.add(job.id);
    else this.active.delete(job.id);
    this.tally();
  }

  tally() {
    this.empty.hidden = this.cards.size > 0;
    const tab = app.extensionManager.getSidebarTabs().find((each) => each.id === TAB);
    if (tab) tab.iconBadge = this.active.size ? String(this.active.size) : null;
  }

  complain(error) {
    this.trouble.textContent = error.message;
  }
}

async function confirmRemoval(job) {
  const kept = job.concept_file ? ` ${job.concept_file} stays.` : "";
  return app.extensionManager.dialog.confirm({
    title: "Delete this training?",
    message: `The losses, samples and checkpoints of “${job.name}” will be removed.${kept}`,
    type: "delete",
  });
}

/** Load Concept and Apply Concept with this job's concept, in the middle of what is seen. */
async function addToGraph(job) {
  await app.refreshComboInNodes(); // so that the file is among the choices
  const load = LiteGraph.createNode("LoadConcept");
  const apply = LiteGraph.createNode("ApplyKVDelta");
  const [left, top, width, height] = app.canvas.ds.visible_area;
  load.pos = [left + width / 2 - 320, top + height / 2 - 60];
  apply.pos = [left + width / 2, top + height / 2 - 60];
  app.graph.add(load);
  app.graph.add(apply);
  load.widgets.find((widget) => widget.name === "concept_name").value = job.concept_file;
  load.connect(0, apply, apply.findInputSlot("concept"));
  app.canvas.setDirty(true, true);
}

export function registerPanel() {
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = new URL("../css/panel.css", import.meta.url).href;
  document.head.append(style);
  const panel = new Panel();
  app.extensionManager.registerSidebarTab({
    id: TAB,
    icon: "pi pi-chart-line",
    iconBadge: null,
    title: "Trainings",
    tooltip: "Trainings: watch and steer what Custom Diffusion learns",
    type: "custom",
    render: (place) => panel.open(place),
  });
  panel.refresh(); // for the badge
}
