/** What users can set in ComfyUI's dialog. Names in other languages: locales/<language>/settings.json. */

export const SHARE_SETTING = "CustomDiffusion.ShareDevice";
export const KEEP_SETTING = "CustomDiffusion.KeepBest";
export const TOAST_SETTING = "CustomDiffusion.ToastWhenDone";
export const SOUND_SETTING = "CustomDiffusion.SoundWhenDone";

/** What new Train nodes begin with: input → setting */
export const BEGIN_WITH = { share_device: SHARE_SETTING, keep_best: KEEP_SETTING };

export const SETTINGS = [
  setting(SHARE_SETTING, "New Train nodes train while prompts run", "boolean", false),
  setting(KEEP_SETTING, "Concepts that new Train nodes keep beside the newest", "number", 1),
  setting(TOAST_SETTING, "Tell when a training has ended", "boolean", true),
  setting(SOUND_SETTING, "Play a sound when a training has ended", "boolean", false),
];

function setting(id, name, type, defaultValue) {
  const limits = type === "number" ? { attrs: { min: 1, max: 100 } } : {};
  return { id, name, type, defaultValue, category: ["Custom Diffusion", "Trainings", id], ...limits };
}
