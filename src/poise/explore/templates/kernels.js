"use strict";
// Run the graphs of graphs.py. All values are float32 and lie in one memory.
// Products are computed by a small WebAssembly module with vectors of four numbers, which is
// assembled here. Without such vectors, plain JavaScript computes the same sums in float64.
const Kernels = (() => {
  // -- WebAssembly -----------------------------------------------------------------------------
  const I32 = 0x7f, F32 = 0x7d, V128 = 0x7b;
  const number = (value) => {  // LEB128, signed: also right for the small unsigned numbers here
    const bytes = [];
    for (;;) {
      const low = value & 0x7f;
      value >>= 7;
      if ((value === 0 && !(low & 0x40)) || (value === -1 && low & 0x40)) return [...bytes, low];
      bytes.push(low | 0x80);
    }
  };
  const unsigned = (value) => value < 0x80 ? [value] : [value & 0x7f | 0x80, ...unsigned(value >> 7)];
  const get = (k) => [0x20, ...unsigned(k)], set = (k) => [0x21, ...unsigned(k)];
  const constant = (value) => [0x41, ...number(value)];
  const add = [0x6a], load = (offset) => [0xfd, 0x00, 2, ...unsigned(offset)];
  const step = (k, code) => [...get(k), ...code, ...add, ...set(k)];
  const f32x4 = { splatOfLoad: [0xfd, 0x09, 2, 0], add: [0xfd, 0xe4, 0x01], mul: [0xfd, 0xe6, 0x01] };
  const loopWhile = (counter, body) =>
    [0x03, 0x40, ...body, ...step(counter, constant(-1)), ...get(counter), 0x0d, 0, 0x0b];
  const vector = (bytes) => [...unsigned(bytes.length), ...bytes];
  const section = (id, entries) => [id, ...vector([...unsigned(entries.length), ...entries.flat()])];
  const text = (word) => vector([...new TextEncoder().encode(word)]);

  // c = a b for `rows` rows of a and 4 `vectors` columns of b.
  // Parameters: addresses a, b, c; the inner length k; bytes between the rows of a, b and c.
  function tile(rows, vectors) {
    const [a, b, c, k, ofA, ofB, ofC] = [0, 1, 2, 3, 4, 5, 6];
    const pointer = (r) => 7 + r, sums = 7 + rows, loaded = sums + rows * vectors;
    const sum = (r, v) => sums + r * vectors + v;
    const code = [...get(a), ...set(pointer(0))];
    for (let r = 1; r < rows; r++) code.push(...get(pointer(r - 1)), ...get(ofA), ...add, ...set(pointer(r)));
    const body = [];
    for (let v = 0; v < vectors; v++) body.push(...get(b), ...load(16 * v), ...set(loaded + v));
    for (let r = 0; r < rows; r++) {
      body.push(...get(pointer(r)), ...f32x4.splatOfLoad, ...set(loaded + vectors));
      for (let v = 0; v < vectors; v++) {
        body.push(...get(sum(r, v)), ...get(loaded + vectors), ...get(loaded + v));
        body.push(...f32x4.mul, ...f32x4.add, ...set(sum(r, v)));
      }
      body.push(...step(pointer(r), constant(4)));
    }
    code.push(...loopWhile(k, [...body, ...step(b, get(ofB))]));
    for (let r = 0; r < rows; r++) {
      for (let v = 0; v < vectors; v++) {
        code.push(...get(c), ...get(sum(r, v)), 0xfd, 0x0b, 2, ...unsigned(16 * v));
      }
      code.push(...step(c, get(ofC)));
    }
    const locals = [2, ...unsigned(rows), I32, ...unsigned(rows * vectors + vectors + 1), V128];
    return vector([...locals, ...code, 0x0b]);
  }

  // The sum of a[i] b[i] over 4 n numbers. Parameters: addresses a and b, and n.
  function dot() {
    const [a, b, n, sum] = [0, 1, 2, 3];
    const body = [...get(sum), ...get(a), ...load(0), ...get(b), ...load(0), ...f32x4.mul, ...f32x4.add, ...set(sum)];
    const code = loopWhile(n, [...body, ...step(a, constant(16)), ...step(b, constant(16))]);
    for (let lane = 0; lane < 4; lane++) code.push(...get(sum), 0xfd, 0x1f, lane, ...(lane ? [0x92] : []));
    return vector([1, 1, V128, ...code, 0x0b]);
  }

  const TILES = [[1, 1], [1, 2], [4, 1], [4, 2]];
  function assembled() {
    const types = [[0x60, ...vector(Array(7).fill(I32)), 0], [0x60, ...vector([I32, I32, I32]), 1, F32]];
    const kinds = [...TILES.map(() => [0]), [1]];
    const names = [...TILES.map(([r, v]) => `tile${r}${v}`), "dot"];
    const codes = [...TILES.map(([r, v]) => tile(r, v)), dot()];
    return new Uint8Array([
      0x00, 0x61, 0x73, 0x6d, 1, 0, 0, 0,
      ...section(1, types),
      ...section(2, [[...text("page"), ...text("memory"), 0x02, 0, 1]]),
      ...section(3, kinds),
      ...section(7, names.map((name, index) => [...text(name), 0, index])),
      ...section(10, codes),
    ]);
  }

  let compiled;  // undefined: not tried; null: this browser has no vectors
  function compile() {
    if (compiled === undefined) {
      try { compiled = new WebAssembly.Module(assembled()); } catch { compiled = null; }
    }
    return compiled;
  }

  // -- Functions of one number -----------------------------------------------------------------
  const sigmoid = (x) => 1 / (1 + Math.exp(-x));
  function erf(x) {  // Abramowitz & Stegun 7.1.26, to 1.5e-7
    const t = 1 / (1 + 0.3275911 * Math.abs(x));
    const tail = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))));
    return Math.sign(x) * (1 - tail * Math.exp(-x * x));
  }
  const clamp = (x, low, high) => Math.min(Math.max(x, low), high);
  const UNARY = {
    relu: () => (x) => x > 0 ? x : 0,
    leaky_relu: (slope = 0.01) => (x) => x > 0 ? x : slope * x,
    silu: () => (x) => x * sigmoid(x),
    sigmoid: () => sigmoid,
    softplus: (beta = 1, threshold = 20) => (x) => beta * x > threshold ? x : Math.log1p(Math.exp(beta * x)) / beta,
    elu: (alpha = 1) => (x) => x > 0 ? x : alpha * Math.expm1(x),
    gelu: () => (x) => 0.5 * x * (1 + erf(x * Math.SQRT1_2)),
    clamp: (low, high) => (x) => clamp(x, low, high),
    rsqrt: () => (x) => 1 / Math.sqrt(x),
    reciprocal: () => (x) => 1 / x,
    square: () => (x) => x * x,
    neg: () => (x) => -x,
    ...Object.fromEntries(["tanh", "exp", "log", "sqrt", "abs", "sin", "cos"].map((name) => [name, () => Math[name]])),
  };
  const BINARY = {
    add: (a, b) => a + b, sub: (a, b) => a - b, mul: (a, b) => a * b, div: (a, b) => a / b,
    pow: Math.pow, maximum: Math.max, minimum: Math.min,
  };

  // -- A network -------------------------------------------------------------------------------
  const ALIGNMENT = 4, COLUMNS = 65536;  // numbers; the largest part of an image's patches

  class Network {
    // graph: a description of graphs.py. weights: Uint8Array of its constants.
    constructor(graph, weights, vectors = true) {
      this.graph = graph;
      let end = ALIGNMENT;
      this.places = graph.sizes.map((size) => {
        const place = end;
        end += Math.ceil(Math.max(size, 1) / ALIGNMENT) * ALIGNMENT;
        return place;
      });
      this.scratch = end;
      end += Math.max(0, ...graph.steps.map(scratchOf)) + ALIGNMENT;
      const code = vectors ? compile() : null;
      const buffer = code ? new WebAssembly.Memory({ initial: Math.ceil(end / 16384) }) : null;
      this.wasm = code ? new WebAssembly.Instance(code, { page: { memory: buffer } }).exports : null;
      this.data = new Float32Array(buffer ? buffer.buffer : new ArrayBuffer(4 * end));
      const bytes = new Uint8Array(this.data.buffer);
      let from = 0;
      for (const value of graph.constants) {
        const size = 4 * graph.sizes[value];
        bytes.set(weights.subarray(from, from + size), 4 * this.places[value]);
        from += size;
      }
      if (from !== weights.length) throw new Error(`${weights.length} bytes of weights, not ${from}`);
    }

    // Return the outputs for inputs, as arrays.
    run(...inputs) {
      this.graph.inputs.forEach((value, k) => this.of(value).set(inputs[k]));
      for (const step of this.graph.steps) {
        this[step.op](step, step.in.map((value) => this.places[value]), this.places[step.out]);
      }
      return this.graph.outputs.map((value) => this.of(value).slice());
    }

    of(value) {
      return this.data.subarray(this.places[value], this.places[value] + this.graph.sizes[value]);
    }

    // c = a b, of (m, k) and (k, n), with `width` numbers between the rows of b, `pitch` of c.
    product(m, n, k, a, b, width, c, pitch) {
      const { data, wasm } = this;
      let column = 0;
      while (wasm && n - column >= 4) {
        const vectors = n - column >= 8 ? 2 : 1;
        for (let row = 0; row < m;) {
          const rows = m - row >= 4 ? 4 : 1;
          const run = rows === 4 ? (vectors === 2 ? wasm.tile42 : wasm.tile41) : vectors === 2 ? wasm.tile12 : wasm.tile11;
          run(4 * (a + row * k), 4 * (b + column), 4 * (c + row * pitch + column), k, 4 * k, 4 * width, 4 * pitch);
          row += rows;
        }
        column += 4 * vectors;
      }
      for (; column < n; column++) {
        for (let row = 0; row < m; row++) {
          let sum = 0;
          for (let i = 0, x = a + row * k, y = b + column; i < k; i++, y += width) sum += data[x + i] * data[y];
          data[c + row * pitch + column] = sum;
        }
      }
    }

    linear({ inputs, outputs, out }, [x, weight, bias], y) {
      const { data, wasm } = this;
      const rows = this.graph.sizes[out] / outputs, whole = wasm && inputs % 4 === 0 ? inputs : 0;
      for (let row = 0; row < rows; row++, x += inputs, y += outputs) {
        for (let k = 0; k < outputs; k++) {
          const w = weight + k * inputs;
          let sum = bias === undefined ? 0 : data[bias + k];
          if (whole) sum += wasm.dot(4 * x, 4 * w, whole / 4);
          for (let i = whole; i < inputs; i++) sum += data[x + i] * data[w + i];
          data[y + k] = sum;
        }
      }
    }

    conv(step, [x, weight, bias], y) {
      const { input: [channels, height, width], output: [outputs, rows, columns], kernel, groups } = step;
      const of = { channels: channels / groups, outputs: outputs / groups };
      const k = of.channels * kernel[0] * kernel[1], plane = rows * columns;
      for (let g = 0; g < groups; g++) {
        const from = x + g * of.channels * height * width, filters = weight + g * of.outputs * k;
        const to = y + g * of.outputs * plane;
        if (isPointwise(step)) {
          this.product(of.outputs, plane, k, filters, from, plane, to, plane);
          continue;
        }
        const part = rowsAtOnce(k, columns, rows);
        for (let row = 0; row < rows; row += part) {
          const count = Math.min(part, rows - row);
          this.patches(step, from, of.channels, row, count);
          this.product(of.outputs, count * columns, k, filters, this.scratch, count * columns, to + row * columns, plane);
        }
      }
      if (bias !== undefined) this.addToPlanes(y, outputs, plane, bias);
    }

    // Write the patch below each pixel of some rows of the output as a column.
    patches({ input: [, height, width], output: [, , columns], kernel, stride, padding, dilation }, x, channels, first, rows) {
      const { data } = this;
      let to = this.scratch;
      for (let channel = 0; channel < channels; channel++, x += height * width) {
        for (let ky = 0; ky < kernel[0]; ky++) {
          for (let kx = 0; kx < kernel[1]; kx++) {
            const left = kx * dilation[1] - padding[1];
            for (let row = first; row < first + rows; row++) {
              const line = row * stride[0] + ky * dilation[0] - padding[0];
              if (line < 0 || line >= height) {
                data.fill(0, to, to + columns);
                to += columns;
                continue;
              }
              const from = x + line * width;
              for (let column = 0, place = left; column < columns; column++, place += stride[1]) {
                data[to++] = place >= 0 && place < width ? data[from + place] : 0;
              }
            }
          }
        }
      }
    }

    conv_transpose({ input: [channels, height, width], output: [outputs, rows, columns], kernel, stride, padding, dilation, groups }, [x, weight, bias], y) {
      const { data, scratch } = this;
      const inputs = channels / groups, each = outputs / groups, plane = height * width;
      const products = each * kernel[0] * kernel[1];
      data.fill(0, y, y + outputs * rows * columns);
      for (let g = 0; g < groups; g++) {
        this.product(products, plane, inputs, weight + g * products * inputs, x + g * inputs * plane, plane, scratch, plane);
        let from = scratch;
        for (let output = g * each; output < (g + 1) * each; output++) {
          for (let ky = 0; ky < kernel[0]; ky++) {
            for (let kx = 0; kx < kernel[1]; kx++) {
              for (let row = 0; row < height; row++) {
                const line = row * stride[0] + ky * dilation[0] - padding[0];
                const to = y + (output * rows + line) * columns, inside = line >= 0 && line < rows;
                for (let column = 0; column < width; column++, from++) {
                  const place = column * stride[1] + kx * dilation[1] - padding[1];
                  if (inside && place >= 0 && place < columns) data[to + place] += data[from];
                }
              }
            }
          }
        }
      }
      if (bias !== undefined) this.addToPlanes(y, outputs, rows * columns, bias);
    }

    addToPlanes(y, channels, plane, bias) {
      const { data } = this;
      for (let channel = 0; channel < channels; channel++) {
        const added = data[bias + channel];
        for (const end = y + plane; y < end; y++) data[y] += added;
      }
    }

    norm({ rows, eps, channels, each, out }, [x, weight, bias], y) {
      const { data } = this;
      const size = this.graph.sizes[out] / rows;
      for (let row = 0; row < rows; row++) {
        let sum = 0, squares = 0;
        for (let i = row * size; i < (row + 1) * size; i++) sum += data[x + i];
        const mean = sum / size;
        for (let i = row * size; i < (row + 1) * size; i++) squares += (data[x + i] - mean) ** 2;
        const scale = 1 / Math.sqrt(squares / size + eps);
        for (let i = row * size; i < (row + 1) * size; i++) {
          const channel = Math.floor(i / each) % channels;
          data[y + i] = (data[x + i] - mean) * scale * data[weight + channel] + data[bias + channel];
        }
      }
    }

    attention({ batch, rows, keys, width, outputs, scale }, [query, key, value], y) {
      const { data } = this, shares = new Float64Array(keys);
      for (let head = 0; head < batch; head++) {
        const k = key + head * keys * width, v = value + head * keys * outputs;
        for (let row = 0; row < rows; row++) {
          const q = query + (head * rows + row) * width, to = y + (head * rows + row) * outputs;
          for (let j = 0; j < keys; j++) {
            let sum = 0;
            for (let i = 0; i < width; i++) sum += data[q + i] * data[k + j * width + i];
            shares[j] = sum * scale;
          }
          soften(shares, 0, keys);
          for (let i = 0; i < outputs; i++) {
            let sum = 0;
            for (let j = 0; j < keys; j++) sum += shares[j] * data[v + j * outputs + i];
            data[to + i] = sum;
          }
        }
      }
    }

    softmax({ size, out }, [x], y) {
      this.data.copyWithin(y, x, x + this.graph.sizes[out]);
      for (let row = 0; row < this.graph.sizes[out]; row += size) soften(this.data, y + row, size);
    }

    reduce({ kind, size, out }, [x], y) {
      const { data } = this;
      for (let row = 0; row < this.graph.sizes[out]; row++) {
        let sum = 0;
        for (let i = row * size; i < (row + 1) * size; i++) sum += data[x + i];
        data[y + row] = kind === "mean" ? sum / size : sum;
      }
    }

    unary({ kind, settings, out }, [x], y) {
      const { data } = this, size = this.graph.sizes[out], f = UNARY[kind](...settings);
      for (let i = 0; i < size; i++) data[y + i] = f(data[x + i]);
    }

    binary({ kind, shape, strides, out }, [a, b], y) {
      const { data } = this, size = this.graph.sizes[out], f = BINARY[kind];
      const inner = shape.length ? shape[shape.length - 1] : 1;
      const one = shape.length ? strides[0][shape.length - 1] : 0, two = shape.length ? strides[1][shape.length - 1] : 0;
      const rowsOfB = rowsOf(shape, strides[1], 0);
      rowsOf(shape, strides[0], 0).forEach((start, row) => {
        let from = a + start, other = b + rowsOfB[row];
        for (let i = 0, to = y + row * inner; i < inner; i++, from += one, other += two) data[to + i] = f(data[from], data[other]);
      });
    }

    copy({ shape, strides, offset }, [x], y) {
      const { data } = this, inner = shape.length ? shape[shape.length - 1] : 1;
      const stride = shape.length ? strides[shape.length - 1] : 0;
      for (const start of rowsOf(shape, strides, offset)) {
        for (let i = 0, from = x + start; i < inner; i++, from += stride) data[y++] = data[from];
      }
    }

    pad({ given, shape, before, fill, out }, [x], y) {
      const { data } = this;
      data.fill(fill, y, y + this.graph.sizes[out]);
      const copied = (dim, from, to) => {
        for (let i = Math.max(0, -before[dim]); i < given[dim] && i + before[dim] < shape[dim]; i++) {
          const source = from * given[dim] + i, target = to * shape[dim] + i + before[dim];
          if (dim === shape.length - 1) data[y + target] = data[x + source];
          else copied(dim + 1, source, target);
        }
      };
      copied(0, 0, 0);
    }

    join({ inner, rows }, parts, y) {
      for (let row = 0; row < rows; row++) {
        parts.forEach((x, k) => {
          this.data.copyWithin(y, x + row * inner[k], x + (row + 1) * inner[k]);
          y += inner[k];
        });
      }
    }
  }

  const isPointwise = ({ kernel, stride, padding }) =>
    kernel[0] * kernel[1] === 1 && stride[0] * stride[1] === 1 && padding[0] + padding[1] === 0;
  const rowsAtOnce = (k, columns, rows) => Math.min(rows, Math.max(1, Math.floor(COLUMNS / (k * columns))));

  function scratchOf(step) {
    if (step.op === "conv" && !isPointwise(step)) {
      const k = step.input[0] / step.groups * step.kernel[0] * step.kernel[1];
      return k * step.output[2] * rowsAtOnce(k, step.output[2], step.output[1]);
    }
    if (step.op === "conv_transpose") {
      const [, height, width] = step.input;
      return step.output[0] / step.groups * step.kernel[0] * step.kernel[1] * height * width;
    }
    return 0;
  }

  // The places of the rows of a view: where its last dimension begins.
  function rowsOf(shape, strides, offset) {
    let starts = [offset];
    for (let dim = 0; dim < shape.length - 1; dim++) {
      starts = starts.flatMap((start) => Array.from({ length: shape[dim] }, (_, i) => start + i * strides[dim]));
    }
    return starts;
  }

  function soften(values, first, size) {
    let highest = -Infinity, sum = 0;
    for (let i = first; i < first + size; i++) highest = Math.max(highest, values[i]);
    for (let i = first; i < first + size; i++) sum += values[i] = Math.exp(values[i] - highest);
    for (let i = first; i < first + size; i++) values[i] /= sum;
  }

  return { Network, erf, hasVectors: () => compile() !== null };
})();
