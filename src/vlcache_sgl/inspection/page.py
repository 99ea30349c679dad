"""One HTML page that needs nothing else: images and positions are inside, a slider goes through the layers."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from vlcache_sgl.client.client import data_url
from vlcache_sgl.inspection.layout import Inspection, Look


def write_page(seen: Inspection, path: Path) -> None:
    """Write the page."""
    same = seen.answer == seen.full_answer
    path.write_text(
        _PAGE.substitute(
            question=html.escape(seen.question),
            full_answer=html.escape(seen.full_answer) or "<i>nothing</i>",
            answer=html.escape(seen.answer) or "<i>nothing</i>",
            verdict="the same answer" if same else "another answer",
            tone="same" if same else "other",
            policy=html.escape(seen.policy),
            budget=html.escape(seen.budget),
            model=html.escape(seen.model),
            tokens=seen.kept.shape[1],
            vision=int(seen.is_vision.sum()),
            layers=seen.layers,
            last_layer=seen.layers - 1,
            ratio=f"{seen.ratio:.1%}",
            attention=_ATTENTION + percents(seen.attention) if seen.attention else "",
            # "</" would end the script.
            data=json.dumps(_data(seen)).replace("</", "<\\/"),
        ),
        encoding="utf-8",
    )


def percents(shares: Sequence[float]) -> str:
    """
    >>> percents((0.5, 0.934))
    '50 %, 93 %'
    """
    return ", ".join(f"{100 * share:.0f} %" for share in shares)


_ATTENTION = "Of the attention of the full cache's answer, what is kept has, by layer: "


def _data(seen: Inspection) -> dict[str, Any]:
    return {
        "images": [data_url(image) for image in seen.images],
        "length": seen.kept.shape[1],
        "numbers": [seen.number(layer) for layer in range(seen.layers)],
        "kept": [np.flatnonzero(layer).tolist() for layer in seen.kept],
        "vision": seen.vision,
        "looks": [_look(look) for look in seen.looks],
    }


def _look(look: Look) -> dict[str, Any]:
    return {
        "item": look.item,
        "title": look.title,
        "first": look.first,
        "rows": look.rows,
        "columns": look.columns,
        "step": look.columns + look.newlines,
        "pad": look.fit == "pad",
    }


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$policy at $budget: $question</title>
<style>
  body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #212529; }
  h1 { font-size: 1.3rem; margin: 0 0 .6rem; }
  h2 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
  table { border-collapse: collapse; }
  td { padding: .15rem 1rem .15rem 0; vertical-align: top; }
  .same { color: #2b8a3e; } .other { color: #c92a2a; } .quiet { color: #868e96; }
  .looks { display: flex; flex-wrap: wrap; gap: 1rem; }
  figure { margin: 0; } figcaption { color: #868e96; font-size: .85rem; }
  canvas { max-width: 100%; border: 1px solid #dee2e6; }
  #map, #bars { width: 100%; image-rendering: pixelated; cursor: pointer; }
  label { display: inline-block; margin-right: 1.5rem; }
  input[type=range] { width: 22rem; max-width: 60vw; vertical-align: middle; }
  .key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
</style>
</head>
<body>
<h1>$question</h1>
<table>
<tr><td>full cache</td><td>$full_answer</td><td></td></tr>
<tr><td>$policy, budget $budget</td><td>$answer</td><td class="$tone">$verdict</td></tr>
</table>
<p class="quiet">$model: $tokens prompt tokens, $vision of them vision; $ratio of $layers layers' tokens kept.</p>

<h2>What a layer keeps of the image</h2>
<p>
  <label><input type="checkbox" id="all"> how many layers keep a patch</label>
  <label>layer <input type="range" id="layer" min="0" max="$last_layer" value="$last_layer"> <b id="number"></b></label>
  <span id="count" class="quiet"></span>
</p>
<div class="looks" id="looks"></div>

<h2>Layer budgets
  <span class="key" style="background:#0b7285"></span>vision
  <span class="key" style="background:#e8590c"></span>text</h2>
<canvas id="bars"></canvas>
<p class="quiet">$attention</p>

<h2>Layers (down) and positions in the prompt (across)</h2>
<canvas id="map"></canvas>
<p class="quiet">Click a layer in either drawing to see it above.</p>

<script>
"use strict";
const data = $data;
const VISION = "#0b7285", TEXT = "#e8590c", EMPTY = "#f1f3f5";
const layers = data.kept.length;
const rows = lists => lists.map(positions => {
  const row = new Uint8Array(data.length);
  for (const p of positions) row[p] = 1;
  return row;
});
const kept = rows(data.kept);
const share = new Float32Array(data.length);
for (const row of kept) for (let p = 0; p < data.length; p++) share[p] += row[p] / layers;
const isVision = new Uint8Array(data.length);
for (const [begin, end] of data.vision) isVision.fill(1, begin, end);
const slider = document.getElementById("layer"), all = document.getElementById("all");

const looks = data.looks.map(look => {
  const figure = document.createElement("figure"), canvas = document.createElement("canvas");
  const caption = document.createElement("figcaption");
  caption.textContent = look.title + ": " + look.rows + " x " + look.columns + " tokens";
  figure.append(canvas, caption);
  document.getElementById("looks").append(figure);
  const image = new Image();
  image.onload = () => { canvas.width = image.width; canvas.height = image.height; draw(); };
  image.src = data.images[look.item];
  return {look, canvas, image};
});

// A patch's box in pixels; with padding the grid covers the square around the image.
function box(look, row, column, width, height) {
  const square = Math.max(width, height);
  const w = look.pad ? square : width, h = look.pad ? square : height;
  const x0 = (width - w) / 2, y0 = (height - h) / 2;
  return [x0 + column * w / look.columns, y0 + row * h / look.rows, w / look.columns, h / look.rows];
}

function draw() {
  const layer = Number(slider.value);
  document.getElementById("number").textContent = data.numbers[layer];
  const row = kept[layer];
  let total = 0, vision = 0;
  for (let p = 0; p < data.length; p++) { total += row[p]; vision += row[p] & isVision[p]; }
  document.getElementById("count").textContent = all.checked ? "" :
    total + " tokens kept, " + vision + " of them vision";
  for (const {look, canvas, image} of looks) {
    if (!image.complete || !canvas.width) continue;
    const c = canvas.getContext("2d");
    c.drawImage(image, 0, 0);
    for (let r = 0; r < look.rows; r++) for (let k = 0; k < look.columns; k++) {
      const p = look.first + r * look.step + k;
      const veil = all.checked ? .9 * (1 - share[p]) : (row[p] ? 0 : .8);
      if (veil > 0) {
        c.fillStyle = "rgba(173,181,189," + veil + ")";
        c.fillRect(...box(look, r, k, image.width, image.height));
      }
    }
  }
  drawBars(layer); drawMap(layer);
}

const LEFT = 44;
function drawBars(layer) {
  const canvas = document.getElementById("bars"), step = Math.max(10, Math.min(22, 360 / layers));
  canvas.width = 1100; canvas.height = layers * step + 4;
  const c = canvas.getContext("2d");
  const counts = kept.map(row => {
    let v = 0, t = 0;
    for (let p = 0; p < data.length; p++) if (row[p]) isVision[p] ? v++ : t++;
    return [v, t];
  });
  const most = Math.max(...counts.map(([v, t]) => v + t), 1), scale = (canvas.width - LEFT - 60) / most;
  c.font = "11px system-ui"; c.textBaseline = "middle";
  counts.forEach(([v, t], i) => {
    const y = i * step + 2, h = step - 2;
    c.fillStyle = i === layer && !all.checked ? "#212529" : "#868e96";
    c.textAlign = "right"; c.fillText(data.numbers[i], LEFT - 8, y + h / 2);
    c.fillStyle = VISION; c.fillRect(LEFT, y, v * scale, h);
    c.fillStyle = TEXT; c.fillRect(LEFT + v * scale, y, t * scale, h);
    c.fillStyle = "#495057"; c.textAlign = "left"; c.fillText(v + t, LEFT + (v + t) * scale + 6, y + h / 2);
  });
}

function drawMap(layer) {
  const canvas = document.getElementById("map"), step = Math.max(4, Math.min(14, 240 / layers));
  canvas.width = 1100; canvas.height = layers * step;
  const c = canvas.getContext("2d"), scale = (canvas.width - LEFT) / data.length;
  c.fillStyle = EMPTY; c.fillRect(LEFT, 0, canvas.width, canvas.height);
  kept.forEach((row, i) => {
    for (let p = 0; p < data.length; p++) if (row[p]) {
      c.fillStyle = isVision[p] ? VISION : TEXT;
      c.fillRect(LEFT + p * scale, i * step, Math.max(1, scale), step - 1);
    }
  });
  if (!all.checked) { c.fillStyle = "#212529"; c.fillText("\\u25b6", LEFT - 18, layer * step + step); }
}

function choose(event) {
  const canvas = event.currentTarget, bounds = canvas.getBoundingClientRect();
  const layer = Math.floor((event.clientY - bounds.top) / bounds.height * layers);
  slider.value = Math.max(0, Math.min(layers - 1, layer)); all.checked = false; draw();
}
document.getElementById("map").onclick = choose;
document.getElementById("bars").onclick = choose;
slider.oninput = () => { all.checked = false; draw(); };
all.onchange = draw;
draw();
</script>
</body>
</html>
""")
