/** Telling that a training has ended to somebody who looks elsewhere: a toast, a sound. */

import { app } from "../../../scripts/app.js";
import * as jobs from "./jobs.js";
import { SOUND_SETTING, TOAST_SETTING } from "./settings.js";
import { t } from "./words.js";

const SHOWN_MS = 10_000;
const TOASTS = {
  finished: ["success", "toastFinished"],
  stopped: ["info", "toastStopped"],
  failed: ["error", "toastFailed"],
};

export function registerNotices() {
  const active = new Set();
  jobs.listen((job) => {
    if (jobs.ACTIVE.includes(job.state)) active.add(job.id);
    else if (active.delete(job.id) && TOASTS[job.state]) tell(job);
  });
}

function tell(job) {
  const { setting, toast } = app.extensionManager;
  const [severity, ended] = TOASTS[job.state];
  const key = job.state === "stopped" && !job.concept_file ? "toastUnsaved" : ended;
  const detail = job.error || job.concept_file || "";
  if (setting.get(TOAST_SETTING)) toast.add({ severity, summary: t(key, job), detail, life: SHOWN_MS });
  if (setting.get(SOUND_SETTING)) chime();
}

/** Two soft tones, a fifth apart. */
function chime() {
  const audio = new AudioContext();
  for (const [index, hertz] of [523, 784].entries()) {
    const at = audio.currentTime + 0.18 * index;
    const tone = new OscillatorNode(audio, { frequency: hertz });
    const volume = new GainNode(audio, { gain: 0 });
    volume.gain.linearRampToValueAtTime(0.2, at + 0.02);
    volume.gain.linearRampToValueAtTime(0, at + 0.5);
    tone.connect(volume).connect(audio.destination);
    tone.start(at);
    tone.stop(at + 0.5);
  }
}
