"use strict";
// A run: its networks, its codes and its priors.
class Model {
  // scene: the values of scene.py. bytesOf: a function from the name of a part to its bytes.
  constructor(scene, bytesOf) {
    Object.assign(this, { scene, bytesOf, arrays: {}, networks: {} });
    const floats = new Float32Array(bytesOf("arrays").buffer);
    let from = 0;
    for (const [name, shape] of scene.arrays) {
      const size = shape.reduce((a, b) => a * b, 1);
      this.arrays[name] = floats.subarray(from, from += size);
    }
  }

  row(name, k, size = this.scene.latents) {
    return this.arrays[name].subarray(k * size, (k + 1) * size);
  }

  network(name) {
    return this.networks[name] ??= new Kernels.Network(this.scene.networks[name], this.bytesOf(`weights-${name}`));
  }

  decode(latents) { return this.network("decoder").run(latents)[0]; }

  encode(image) { return this.network("encoder").run(image)[0]; }

  // The code on the arc about 0 between two codes, or on the line (poise.latent.spherical_path).
  between(a, b, t) {
    const dot = (x, y) => x.reduce((sum, value, k) => sum + value * y[k], 0);
    const norms = Math.sqrt(dot(a, a) * dot(b, b));
    const angle = Math.acos(Math.min(1, Math.max(-1, dot(a, b) / Math.max(norms, Number.MIN_VALUE))));
    const straight = this.scene.straight || Math.sin(angle) < 1e-6 || norms === 0;
    const [p, q] = straight ? [1 - t, t] : [Math.sin((1 - t) * angle) / Math.sin(angle), Math.sin(t * angle) / Math.sin(angle)];
    return a.map((value, k) => p * value + q * b[k]);
  }

  // The latents of an image of a seed under a prior.
  async latentsOf(prior, seed, image) {
    const latents = await this[prior.kind](prior, Noise.ofImage(seed, image, prior.noise));
    return latents.map((value) => value * prior.factor);
  }

  normal(prior, noise) { return noise; }

  traced(prior, noise) { return this.network(prior.name).run(noise)[0]; }

  mixture(prior, noise) {
    const size = this.scene.latents, share = 0.5 * (1 + Kernels.erf(noise[0] * Math.SQRT1_2));
    const chosen = this.arrays.bounds.filter((bound) => bound < share).length;
    return this.row("means", chosen).map((mean, i) => {
      let sum = mean;
      for (let j = 0; j < size; j++) sum += this.arrays.factors[(chosen * size + i) * size + j] * noise[1 + j];
      return sum;
    });
  }

  // The solver of poise.priors.flow_prior.
  async flow(prior, y) {
    const h = 1 / prior.steps, velocity = this.network(prior.name);
    for (let step = 0; step < prior.steps; step++) {
      let v = velocity.run(y, [step * h])[0];
      if (prior.solver === "heun" && step < prior.steps - 1) {
        const second = velocity.run(y.map((value, k) => value + h * v[k]), [step * h + h])[0];
        v = v.map((value, k) => (value + second[k]) / 2);
      }
      y = y.map((value, k) => value + h * v[k]);
      await Model.pause();
    }
    return y.map((value, k) => this.arrays["flow mean"][k] + this.arrays["flow std"][k] * value);
  }

  // Let the browser draw and listen.
  static pause() { return new Promise((resolve) => setTimeout(resolve)); }
}
