// Buttons and a curve of the loss on a node while it trains; they are gone when it has ended.
import { app } from "../../../scripts/app.js";
import { api } from "../../../scripts/api.js";
import { findNode, showNote } from "./graph.js";

const NODE_TYPE = "LoraLoom_TrainLora";
const WIDGET = "lora_loom_run";
const ENDS = ["finished", "stopped", "failed"];
const TEXT_WIDGET = "$$node-text-preview";
const HEIGHT = 132;
const MOST_POINTS = 400;
const BUTTONS = {
  save: ["Save now", "Save the LoRA as it is; the training goes on."],
  sample: ["Sample now", "Draw the sample prompts; the training goes on."],
  pause: ["Pause", "Wait after this step until Resume."],
  resume: ["Resume", "Go on with the training."],
  stop: [
    "Stop and save",
    "End the training now. The workflow goes on with the LoRA so far; queue again to continue.",
  ],
};
const STYLE = `
.lora-loom-run { display: flex; flex-direction: column; gap: 4px; height: 100%;
  box-sizing: border-box; padding: 2px 0; }
.lora-loom-run svg { flex: 1; min-height: 0; max-height: 72px; width: 100%; border-radius: 4px;
  background: var(--comfy-input-bg, #222); }
.lora-loom-run polyline { fill: none; stroke: var(--p-primary-color, #60a5fa); stroke-width: 1.5;
  vector-effect: non-scaling-stroke; }
.lora-loom-run div { display: grid; grid-template-columns: 1fr 1fr; gap: 4px; }
.lora-loom-run button { height: 24px; padding: 0 4px; border-radius: 4px; font-size: 12px;
  overflow: hidden; white-space: nowrap; cursor: pointer; color: var(--input-text, #ddd);
  background: var(--comfy-input-bg, #222); border: 1px solid var(--border-color, #4e4e4e); }
.lora-loom-run button:hover:enabled { filter: brightness(1.3); }
.lora-loom-run button:disabled { opacity: 0.45; cursor: default; }
`;

const panels = new Map(); // of node ids, while they train

class Panel {
  constructor(nodeId, node) {
    this.nodeId = nodeId;
    this.node = node;
    this.points = [];
    this.asked = {}; // command -> how often it was obeyed when it was asked for
    this.element = document.createElement("div");
    this.element.className = "lora-loom-run";
    this.element.innerHTML = `<svg viewBox="0 0 100 100" preserveAspectRatio="none">
      <polyline></polyline></svg><div></div>`;
    this.line = this.element.querySelector("polyline");
    this.buttons = {};
    for (const [command, [label, title]] of Object.entries(BUTTONS)) {
      const button = Object.assign(document.createElement("button"), { title });
      button.textContent = label;
      button.dataset.command = command;
      button.addEventListener("pointerdown", (event) => event.stopPropagation());
      button.addEventListener("click", () => this.ask(command));
      this.buttons[command] = button;
      this.element.lastElementChild.append(button);
    }
    this.add();
  }

  add() {
    const { node } = this;
    const options = {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => HEIGHT,
      getMaxHeight: () => HEIGHT,
    };
    this.sizeBefore = [...node.size];
    this.widget = node.addDOMWidget(WIDGET, "div", this.element, options);
    this.widget.serialize = false; // values of widgets are stored by position
    // Above the line of text that ComfyUI shows while a node runs, which takes what room is left.
    const text = node.widgets.findIndex((widget) => widget.name === TEXT_WIDGET);
    if (text >= 0) node.widgets.splice(text, 0, node.widgets.pop());
    this.resize([node.size[0], Math.max(node.size[1], node.computeSize()[1])]);
    this.sizeWith = [...node.size];
  }

  remove() {
    const { node } = this;
    const index = node.widgets.indexOf(this.widget);
    if (index >= 0) {
      this.widget.onRemove?.();
      node.widgets.splice(index, 1);
    }
    const untouched = node.size.every((side, axis) => Math.abs(side - this.sizeWith[axis]) < 1);
    if (untouched) this.resize(this.sizeBefore);
  }

  resize(size) {
    this.node.setSize(size);
    app.canvas.setDirty(true, true);
  }

  async ask(command) {
    this.asked[command] = this.run.obeyed[command] ?? 0;
    this.update(this.run);
    const answer = await api.fetchApi("/lora_loom/control", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ node_id: this.nodeId, command }),
    });
    if (answer.ok) return;
    const { error } = await answer.json().catch(() => ({ error: answer.statusText }));
    showNote(this.nodeId, "warning", BUTTONS[command][0], error);
    if (answer.status === 404) return end(this.nodeId);
    delete this.asked[command];
    this.update(this.run);
  }

  update(run) {
    this.run = run;
    for (const [command, count] of Object.entries(this.asked)) {
      if ((run.obeyed[command] ?? 0) > count) delete this.asked[command];
    }
    const paused = run.state === "paused";
    for (const [command, button] of Object.entries(this.buttons)) {
      const refused = run.refused[command];
      button.title = refused ?? BUTTONS[command][1];
      button.disabled = refused !== undefined || command in this.asked || "stop" in this.asked;
    }
    this.buttons.pause.hidden = paused;
    this.buttons.resume.hidden = !paused;
    this.draw(run.step, run.smoothed_loss);
  }

  draw(step, loss) {
    if (loss === null) return;
    // A run that went back to an earlier step draws over what it left.
    this.points = this.points.filter((point) => point[0] < step);
    this.points.push([step, loss]);
    if (this.points.length > MOST_POINTS) {
      this.points = this.points.filter((_, index) => index % 2 === 0);
    }
    const [first, last] = [this.points[0][0], step];
    const losses = this.points.map((point) => point[1]);
    const [low, high] = [Math.min(...losses), Math.max(...losses)];
    const x = (value) => (100 * (value - first)) / Math.max(1, last - first);
    const y = (value) => 94 - (88 * (value - low)) / (high - low || 1);
    this.line.setAttribute("points", this.points.map((p) => `${x(p[0])},${y(p[1])}`).join(" "));
  }
}

function show({ detail: run }) {
  if (run.state === "ended") return end(run.node_id);
  const node = findNode(run.node_id);
  let panel = panels.get(run.node_id);
  if (panel && panel.node !== node) {
    end(run.node_id); // another workflow was opened
    panel = undefined;
  }
  if (node?.type !== NODE_TYPE || (!panel && ENDS.includes(run.state))) return;
  if (!panel) {
    panel = new Panel(run.node_id, node);
    panels.set(run.node_id, panel);
  }
  panel.update(run);
}

function end(nodeId) {
  panels.get(nodeId)?.remove();
  panels.delete(nodeId);
}

app.registerExtension({
  name: "LoraLoom.RunControl",
  setup() {
    const style = document.createElement("style");
    style.textContent = STYLE;
    document.head.append(style);
    api.addEventListener("lora_loom.run", show);
    // If the message of the end is lost, that of the whole run says it, too.
    for (const ending of ["execution_success", "execution_error", "execution_interrupted"]) {
      api.addEventListener(ending, () => [...panels.keys()].forEach(end));
    }
  },
});
