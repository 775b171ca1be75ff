/** What the pack adds to ComfyUI's page. Other files here are its parts; each runs only from here. */

import { app } from "../../../scripts/app.js";
import { registerCompletion } from "./completion.js";
import { registerBehind } from "./behind.js";
import { showConcept } from "./concept_card.js";
import * as jobs from "./jobs.js";
import { colourSockets, foldAdvanced, widen } from "./node_looks.js";
import { registerRuns, showRuns } from "./node_runs.js";
import { workflowId } from "./nodes.js";
import { registerNotices } from "./notices.js";
import { registerPanel } from "./panel.js";
import { offerUpload } from "./picture_upload.js";
import { BEGIN_WITH, SETTINGS } from "./settings.js";
import { registerTraining } from "./train_node.js";
import { loadWords } from "./words.js";

const PACK = "custom diffusion"; // the category of its nodes

const isOurs = (comfyClass) => LiteGraph.registered_node_types[comfyClass]?.category === PACK;

function addStyle() {
  const style = document.createElement("link");
  style.rel = "stylesheet";
  style.href = new URL("../css/custom_diffusion.css", import.meta.url).href;
  document.head.append(style);
}

let panel = null; // from setup on

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
    {
      id: "CustomDiffusion.TogglePanel",
      label: "Custom Diffusion: open or close the trainings",
      icon: "pi pi-chart-line",
      function: () => panel.toggle(),
    },
  ],
  keybindings: [{ combo: { key: "t" }, commandId: "CustomDiffusion.TogglePanel" }],
  menuCommands: [{ path: ["Extensions", "Custom Diffusion"], commands: ["CustomDiffusion.TogglePanel", "CustomDiffusion.PauseAll"] }],
  async setup() {
    addStyle();
    colourSockets();
    await loadWords();
    panel = registerPanel();
    registerTraining();
    registerBehind();
    registerRuns(isOurs);
    registerNotices();
    registerCompletion();
  },
  nodeCreated(node) {
    if (!isOurs(node.comfyClass)) return;
    workflowId(); // a graph without one gets it before it runs
    foldAdvanced(node);
    showConcept(node);
    offerUpload(node);
    widen(node);
    for (const [name, setting] of Object.entries(BEGIN_WITH)) {
      const widget = node.widgets?.find((each) => each.name === name);
      if (widget) widget.value = app.extensionManager.setting.get(setting);
    }
  },
  loadedGraphNode(node) {
    showRuns(node); // also of others: they may be behind a training
  },
});
