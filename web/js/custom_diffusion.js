/** What the pack adds to ComfyUI's page. Other files here are its parts; each runs only from here. */

import { app } from "../../../scripts/app.js";
import { registerCompletion } from "./completion.js";
import { showConcept } from "./concept_card.js";
import * as jobs from "./jobs.js";
import { showNotes } from "./node_notes.js";
import { registerNotices } from "./notices.js";
import { registerPanel, TAB } from "./panel.js";
import { BEGIN_WITH, SETTINGS } from "./settings.js";
import { registerTraining, showTraining } from "./train_node.js";
import { loadWords } from "./words.js";

const PACK = "custom diffusion"; // the category of its nodes

function addStyle() {
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = new URL("../css/custom_diffusion.css", import.meta.url).href;
  document.head.append(style);
}

async function pauseAll() {
  const active = (await jobs.list()).jobs.filter((job) => jobs.ACTIVE.includes(job.state));
  await Promise.all(active.map((job) => jobs.steer(job.id, "pause")));
}

app.registerExtension({
  name: "custom_diffusion",
  settings: SETTINGS,
  commands: [
    {
      id: "CustomDiffusion.PauseAll",
      label: "Custom Diffusion: pause all trainings",
      icon: "pi pi-pause",
      function: pauseAll,
    },
  ],
  keybindings: [{ combo: { key: "t" }, commandId: `Workspace.ToggleSidebarTab.${TAB}` }],
  menuCommands: [{ path: ["Extensions", "Custom Diffusion"], commands: ["CustomDiffusion.PauseAll"] }],
  async setup() {
    addStyle();
    await loadWords();
    registerPanel();
    registerTraining();
    registerNotices();
    registerCompletion();
  },
  nodeCreated(node) {
    if (node.constructor.category !== PACK) return;
    showNotes(node);
    showConcept(node);
    for (const [name, setting] of Object.entries(BEGIN_WITH)) {
      const widget = node.widgets?.find((each) => each.name === name);
      if (widget) widget.value = app.extensionManager.setting.get(setting);
    }
  },
  loadedGraphNode: showTraining,
});
