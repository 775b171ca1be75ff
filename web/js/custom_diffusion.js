/** What the pack adds to ComfyUI's page. Other files here are its parts; each runs only from here. */

import { app } from "../../../scripts/app.js";
import { registerPanel } from "./panel.js";

app.registerExtension({
  name: "custom_diffusion",
  setup: registerPanel,
});
