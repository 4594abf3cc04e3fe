// Draws the molecules of a gallery page on canvases. Positions are in Angstrom: x to the right, y up, z towards the
// reader; they turn around 0. Balls and sticks are drawn in the order of their depth.
"use strict"

const BALLS = JSON.parse(document.getElementById("balls").textContent) // symbol -> [radius, [red, green, blue]]
const STICK = [150, 150, 150], WHITE = [255, 255, 255], BLACK = [0, 0, 0]
const STICKS = { 1: [0.1, [0]], 2: [0.07, [-0.13, 0.13]], 3: [0.055, [-0.18, 0, 0.18]] } // radius, places side by side
const HALO = 1.3 // size of pale balls and sticks: they stick out where a molecule lies on its original
const BEHIND = 0.3 // pale ones are drawn as if so far behind, Angstrom
const REACH = 3.3 // from the centre to the edge of a picture, Angstrom; larger molecules are drawn smaller
const EYE = 5 // distance of the eye from the centre, in reaches
const FOGS = 8 // steps of fog from the front to the back
const SPRITE = 128 // side of the picture of a ball, pixels
const TURNS = 0.5 // radians a second of a row under the pointer
const FRAMES = 7 // a second, while a slider plays
const LIGHT = unit([-0.45, 0.6, 0.75])

const calm = matchMedia("(prefers-reduced-motion: reduce)")
const dark = matchMedia("(prefers-color-scheme: dark)")
const settings = { hydrogens: true, labels: false, turning: !calm.matches }

// Vectors and rotations. A rotation is an array of 9 numbers, row by row.

function dot(a, b) { return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] }
function minus(a, b) { return [a[0] - b[0], a[1] - b[1], a[2] - b[2]] }
function along(a, b, s) { return [a[0] + s * b[0], a[1] + s * b[1], a[2] + s * b[2]] } // a + s b
function length(a) { return Math.hypot(a[0], a[1], a[2]) }
function unit(a) { return a.map(x => x / (length(a) || 1)) }
function cross(a, b) { return [a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]] }
function across(a, b) { return along(a, b, -dot(a, b)) } // the part of a perpendicular to the unit vector b
function rotated(r, p) { return [dot(r.slice(0, 3), p), dot(r.slice(3, 6), p), dot(r.slice(6, 9), p)] }

// The rotation r, then one by dx around the vertical and dy around the horizontal axis of the picture.
function turned(r, dx, dy) {
  const [c, s, d, u] = [Math.cos(dx), Math.sin(dx), Math.cos(dy), Math.sin(dy)]
  const rows = [[c, 0, s], [u * s, d, -u * c], [-d * s, u, d * c]]
  const columns = [0, 1, 2].map(i => [r[i], r[i + 3], r[i + 6]])
  const [x, y] = rows.map(row => columns.map(column => dot(row, column)))
  // Rounding must not add up over many turns.
  const [first, second] = [unit(x), unit(across(y, unit(x)))]
  return [...first, ...second, ...cross(first, second)]
}

// Molecules

function molecule(data) {
  const points = data.symbols.map((_, i) => data.positions.slice(3 * i, 3 * i + 3))
  const bonds = []
  for (let k = 0; k < data.bonds.length; k += 3) bonds.push(data.bonds.slice(k, k + 3))
  const sides = bonds.map(bond => ({ ends: bond, side: sideOf(bond, bonds, points) }))
  return { symbols: data.symbols, points, bonds: sides }
}

// In which direction the sticks of a double or triple bond lie beside each other: in the plane of its neighbours.
function sideOf([i, j], bonds, points) {
  const direction = unit(minus(points[j], points[i]))
  const both = bonds.flatMap(([a, b]) => [[a, b], [b, a]])
  const others = both.filter(([a, b]) => (a === i || a === j) && b !== i && b !== j)
  const tries = [...others.map(([a, b]) => minus(points[b], points[a])), [1, 0, 0], [0, 1, 0]]
  return unit(tries.map(v => across(v, direction)).find(v => length(v) > 0.3) || [0, 0, 0])
}

function ball(symbol) { return BALLS[symbol] || BALLS[""] }

// Colours and shades

let paper, sprites
function forget() {
  paper = getComputedStyle(document.documentElement).getPropertyValue("--card").trim().match(/[0-9a-f]{2}/gi)
    .map(part => parseInt(part, 16))
  sprites = new Map()
}

function mixed(colour, other, share) { return colour.map((part, i) => part + (other[i] - part) * share) }
function css(colour) { return `rgb(${colour.map(Math.round).join(" ")})` }

// How much paper is mixed into a colour: more of it farther away, and more in pale molecules.
function fogAt(depth, pale) { return pale ? 0.72 : (dark.matches ? 0.35 : 0.5) * Math.min(Math.max(depth, 0), 1) }

// The picture of a ball under a light from the upper left.
function sprite(colour, fog) {
  const step = Math.round(fog * FOGS * 2) / (FOGS * 2)
  const key = `${colour} ${step}`
  if (!sprites.has(key)) sprites.set(key, drawBall(colour, step))
  return sprites.get(key)
}

function drawBall(colour, fog) {
  if (dark.matches) colour = mixed(colour, WHITE, 0.22) // carbon would be lost
  const canvas = document.createElement("canvas")
  canvas.width = canvas.height = SPRITE
  const context = canvas.getContext("2d")
  const image = context.createImageData(SPRITE, SPRITE)
  const half = unit(along(LIGHT, [0, 0, 1], 1)) // between the light and the eye
  for (let row = 0; row < SPRITE; row++) {
    for (let column = 0; column < SPRITE; column++) {
      const x = (2 * column + 1) / SPRITE - 1, y = 1 - (2 * row + 1) / SPRITE
      const radius = Math.hypot(x, y)
      const normal = [x, y, Math.sqrt(Math.max(0, 1 - radius * radius))]
      const diffuse = 0.5 + 0.56 * Math.max(0, dot(normal, LIGHT))
      const rim = 1 - 0.42 * (1 - normal[2]) ** 2
      const shine = 0.5 * Math.max(0, dot(normal, half)) ** 36
      const shaded = mixed(colour.map(part => Math.min(255, part * diffuse * rim)), WHITE, shine)
      const opacity = Math.min(1, Math.max(0, (1 - radius) * SPRITE / 3))
      image.data.set([...mixed(shaded, paper, fog), 255 * opacity], 4 * (row * SPRITE + column))
    }
  }
  context.putImageData(image, 0, 0)
  return canvas
}

// A picture: a canvas and the molecules in it.

class Picture {
  constructor(canvas, figure, index) {
    [this.canvas, this.figure] = [canvas, figure]
    this.frames = figure.data.frames.map(frame => frame.views[index].map(molecule))
    const points = this.frames.flat().flatMap(each => each.points)
    this.reach = Math.max(REACH, ...points.map(point => length(point) + 0.45))
    this.visible = false // or near the window
    this.stale = true
  }

  draw() {
    const { canvas } = this
    const pixels = window.devicePixelRatio || 1
    const sides = [canvas.clientWidth, canvas.clientHeight]
    const [width, height] = sides.map(side => Math.max(1, Math.round(side * pixels)))
    if (canvas.width !== width || canvas.height !== height) [canvas.width, canvas.height] = [width, height]
    const context = canvas.getContext("2d")
    context.clearRect(0, 0, width, height)
    context.imageSmoothingQuality = "high"
    const view = { centre: [width / 2, height / 2], scale: this.figure.zoom * Math.min(width, height) / 2 / this.reach }
    const shapes = this.frames[this.figure.frame]
    const parts = shapes.flatMap((shape, i) => this.parts(shape, view, i < shapes.length - 1))
    parts.sort((a, b) => a.depth - b.depth)
    for (const part of parts) part.draw(context)
    this.stale = false
  }

  // The balls and sticks of a molecule, each with its depth.
  parts(shape, view, pale) {
    const { reach } = this
    const hidden = i => shape.symbols[i] === "H" && !settings.hydrogens
    const size = pale ? HALO : 1
    const project = point => {
      const near = EYE * reach / (EYE * reach - point[2]) // above 1 in front of the centre
      const scale = view.scale * near
      return { x: view.centre[0] + scale * point[0], y: view.centre[1] - scale * point[1], scale }
    }
    const fog = depth => fogAt((reach - depth) / (2 * reach), pale)
    const points = shape.points.map(point => rotated(this.figure.rotation, point)), parts = []
    points.forEach((point, i) => {
      if (hidden(i)) return
      const [radius, colour] = ball(shape.symbols[i])
      const at = project(point)
      const picture = sprite(colour, fog(point[2]))
      const label = settings.labels && !pale ? shape.symbols[i] : ""
      parts.push({ depth: point[2] - (pale ? BEHIND : 0), draw: context =>
        drawAtom(context, at, radius * size * at.scale, picture, label, colour) })
    })
    for (const { ends: [i, j, order], side } of shape.bonds) {
      if (hidden(i) || hidden(j)) continue
      const direction = unit(minus(points[j], points[i])), beside = rotated(this.figure.rotation, side)
      const [radius, places] = STICKS[order] || STICKS[1]
      const colour = mixed(STICK, paper, fog((points[i][2] + points[j][2]) / 2))
      for (const offset of places) {
        // From surface to surface, a little inside.
        const [from, to] = [[i, 1], [j, -1]].map(([end, sign]) => {
          const inside = Math.sqrt(Math.max(0, ball(shape.symbols[end])[0] ** 2 - offset ** 2)) * 0.85
          return along(along(points[end], direction, sign * inside), beside, offset)
        })
        if (dot(minus(to, from), direction) <= 0) continue // the balls touch
        const [a, b] = [project(from), project(to)]
        parts.push({ depth: (from[2] + to[2]) / 2 - (pale ? BEHIND : 0), draw: context =>
          drawStick(context, a, b, radius * size, colour) })
      }
    }
    return parts
  }
}

function drawAtom(context, at, radius, picture, label, colour) {
  context.drawImage(picture, at.x - radius, at.y - radius, 2 * radius, 2 * radius)
  if (!label) return
  context.font = `600 ${radius * (label.length > 1 ? 0.9 : 1.15)}px system-ui, sans-serif`
  context.textAlign = "center"
  context.textBaseline = "middle"
  context.fillStyle = dot(colour, [0.3, 0.59, 0.11]) > 150 ? "#222" : "#fff"
  context.fillText(label, at.x, at.y + radius * 0.05)
}

function drawStick(context, a, b, radius, colour) {
  const along = Math.hypot(b.x - a.x, b.y - a.y)
  if (along < 0.3) return
  // Across the stick, to the side of the light.
  let normal = [(a.y - b.y) / along, (b.x - a.x) / along]
  if (normal[0] * LIGHT[0] - normal[1] * LIGHT[1] < 0) normal = [-normal[0], -normal[1]]
  const [wideA, wideB] = [radius * a.scale, radius * b.scale]
  const wide = Math.max(wideA, wideB)
  const shade = context.createLinearGradient(
    a.x + normal[0] * wide, a.y + normal[1] * wide, a.x - normal[0] * wide, a.y - normal[1] * wide)
  shade.addColorStop(0, css(mixed(colour, BLACK, 0.12)))
  shade.addColorStop(0.35, css(mixed(colour, WHITE, 0.5)))
  shade.addColorStop(1, css(mixed(colour, BLACK, 0.35)))
  context.fillStyle = shade
  context.beginPath()
  context.moveTo(a.x + normal[0] * wideA, a.y + normal[1] * wideA)
  context.lineTo(b.x + normal[0] * wideB, b.y + normal[1] * wideB)
  context.lineTo(b.x - normal[0] * wideB, b.y - normal[1] * wideB)
  context.lineTo(a.x - normal[0] * wideA, a.y - normal[1] * wideA)
  context.fill()
}

// A figure: pictures that turn together, a caption, and perhaps a slider.

class Figure {
  constructor(element) {
    this.element = element
    this.data = JSON.parse(element.querySelector("script").textContent)
    this.caption = element.querySelector("figcaption")
    this.slider = element.querySelector("input")
    this.play = element.querySelector(".play")
    this.frame = this.data.first
    this.held = new Map() // pointers that are down, by id
    this.pictures = [...element.querySelectorAll("canvas")].map((canvas, i) => new Picture(canvas, this, i))
    for (const { canvas } of this.pictures) this.listen(canvas)
    if (this.slider) {
      this.slider.value = this.frame // browsers keep the last position
      this.slider.addEventListener("input", () => { this.stop(); this.show(Number(this.slider.value)) })
      this.play.addEventListener("click", () => this.timer ? this.stop() : this.start())
      this.show(this.frame)
    }
    this.back()
  }

  back() {
    [this.rotation, this.zoom] = [[1, 0, 0, 0, 1, 0, 0, 0, 1], 1]
    this.change()
  }

  turn(dx, dy) {
    this.rotation = turned(this.rotation, dx, dy)
    this.change()
  }

  enlarge(factor) {
    this.zoom = Math.min(8, Math.max(0.4, this.zoom * factor))
    this.change()
  }

  change() {
    for (const picture of this.pictures) picture.stale = true
    schedule()
  }

  show(frame) {
    this.frame = frame
    const lines = this.data.frames[frame].caption
    this.caption.replaceChildren(...lines.map(([text, kind]) => {
      const line = document.createElement("span")
      line.textContent = text
      line.className = kind
      return line
    }))
    this.slider.value = frame
    this.slider.setAttribute("aria-valuetext", lines.map(([text]) => text).join(", "))
    this.change()
  }

  start() {
    const last = this.data.frames.length - 1
    if (this.frame === last) this.show(0)
    this.play.textContent = "stop"
    this.timer = setInterval(() => {
      this.show(this.frame + 1)
      if (this.frame === last) this.stop()
    }, 1000 / FRAMES)
  }

  stop() {
    clearInterval(this.timer)
    this.timer = 0
    this.play.textContent = "play"
  }

  listen(canvas) {
    canvas.addEventListener("pointerdown", event => {
      canvas.setPointerCapture(event.pointerId)
      this.held.set(event.pointerId, [event.clientX, event.clientY])
    })
    canvas.addEventListener("pointermove", event => this.drag(event, canvas))
    for (const name of ["pointerup", "pointercancel"]) {
      canvas.addEventListener(name, event => this.held.delete(event.pointerId))
    }
    canvas.addEventListener("dblclick", () => this.back())
    canvas.addEventListener("keydown", event => this.press(event))
    // Without focus the wheel scrolls the page; a pinch on a touchpad comes as a wheel with ctrl.
    canvas.addEventListener("wheel", event => {
      if (document.activeElement !== canvas && !event.ctrlKey) return
      event.preventDefault()
      const pixels = event.deltaY * (event.deltaMode ? 16 : 1)
      this.enlarge(Math.exp(-pixels * (event.ctrlKey ? 0.01 : 0.0015)))
    }, { passive: false })
  }

  drag(event, canvas) {
    const before = this.held.get(event.pointerId)
    if (!before) return
    const now = [event.clientX, event.clientY]
    const other = [...this.held].find(([id]) => id !== event.pointerId)
    if (other) { // two fingers
      const [was, is] = [before, now].map(([x, y]) => Math.hypot(x - other[1][0], y - other[1][1]))
      this.enlarge(is / Math.max(was, 1))
    } else {
      const side = Math.max(canvas.clientWidth, 1)
      this.turn(3 * (now[0] - before[0]) / side, 3 * (now[1] - before[1]) / side)
    }
    this.held.set(event.pointerId, now)
  }

  press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return
    const keys = {
      ArrowLeft: () => this.turn(-0.15, 0), ArrowRight: () => this.turn(0.15, 0),
      ArrowUp: () => this.turn(0, -0.15), ArrowDown: () => this.turn(0, 0.15),
      "+": () => this.enlarge(1.2), "=": () => this.enlarge(1.2), "-": () => this.enlarge(1 / 1.2),
      0: () => this.back(), h: () => toggle("hydrogens"), l: () => toggle("labels"),
    }
    const action = keys[event.key] || keys[event.key.toLowerCase()]
    if (!action) return
    event.preventDefault()
    action()
  }
}

// The page

forget()
let scheduled = false, time = 0, row = null // the row under the pointer
const figures = []

function schedule() {
  if (!scheduled) requestAnimationFrame(tick)
  scheduled = true
}

function tick(now) {
  scheduled = false
  const seconds = Math.min(0.05, (now - time) / 1000)
  time = now
  if (row && settings.turning && !row.querySelector(".slide:hover")) {
    for (const figure of figures) if (row.contains(figure.element) && !figure.held.size) figure.turn(TURNS * seconds, 0)
  }
  for (const picture of pictureOf.values()) if (picture.visible && picture.stale) picture.draw()
  if (row && settings.turning) schedule()
}

function refresh() {
  for (const figure of figures) figure.change()
}

const boxes = Object.fromEntries(Object.keys(settings).map(name => [name, document.querySelector(`[name=${name}]`)]))
function toggle(name) {
  settings[name] = boxes[name].checked = !settings[name]
  refresh()
}

for (const element of document.querySelectorAll(".molecule")) figures.push(new Figure(element))
const pictureOf = new Map(figures.flatMap(figure => figure.pictures).map(picture => [picture.canvas, picture]))
const seen = new IntersectionObserver(entries => {
  for (const { target, isIntersecting } of entries) pictureOf.get(target).visible = isIntersecting
  schedule()
}, { rootMargin: "200px" }) // a little ahead of scrolling
const resized = new ResizeObserver(entries => {
  for (const { target } of entries) pictureOf.get(target).stale = true
  schedule()
})
for (const canvas of pictureOf.keys()) {
  seen.observe(canvas)
  resized.observe(canvas)
}
for (const [name, box] of Object.entries(boxes)) {
  box.checked = settings[name]
  box.addEventListener("change", () => toggle(name))
}
for (const element of document.querySelectorAll(".row")) {
  element.addEventListener("pointerenter", event => {
    if (event.pointerType === "touch") return
    row = element
    schedule()
  })
  element.addEventListener("pointerleave", () => { row = null })
}
document.querySelector(".back").addEventListener("click", () => { for (const figure of figures) figure.back() })
dark.addEventListener("change", () => { forget(); refresh() })
calm.addEventListener("change", () => { if (settings.turning === calm.matches) toggle("turning") })
addEventListener("beforeprint", () => { for (const picture of pictureOf.values()) picture.draw() })
