"use strict";
// The noise of image i of a seed, that of poise.support.seeds.noise_per_image on a CPU: a hash of
// (seed, i) seeds a Mersenne twister, and the Box-Muller transform makes normal numbers.
const Noise = (() => {
  // BLAKE2b of a short text, the first 64 bits (RFC 7693).
  const WORD = (1n << 64n) - 1n;
  const START = [
    0x6a09e667f3bcc908n, 0xbb67ae8584caa73bn, 0x3c6ef372fe94f82bn, 0xa54ff53a5f1d36f1n,
    0x510e527fade682d1n, 0x9b05688c2b3e6c1fn, 0x1f83d9abfb41bd6bn, 0x5be0cd19137e2179n,
  ];
  const ORDERS = [
    "0123456789abcdef", "ea489fd61c02b753", "b8c052fdae367194", "7931dcbe265a40f8", "905724afe1bc683d",
    "2c6a0b834d75fe19", "c51fed4a0763928b", "db7ec13950f4862a", "6fe9b308c2d714a5", "a2847615fb9e3cd0",
  ].map((order) => [...order].map((digit) => parseInt(digit, 16)));
  const MIXED = [
    [0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15],
    [0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13], [3, 4, 9, 14],
  ];
  const rotated = (x, by) => x >> by | x << (64n - by) & WORD;

  function hash(text) {
    const block = new Uint8Array(128);
    block.set(new TextEncoder().encode(text));
    const view = new DataView(block.buffer);
    const message = Array.from({ length: 16 }, (_, k) => view.getBigUint64(8 * k, true));
    const state = [...START];
    state[0] ^= 0x01010008n;
    const v = [...state, ...START];
    v[12] ^= BigInt(text.length);
    v[14] ^= WORD;
    for (let round = 0; round < 12; round++) {
      const order = ORDERS[round % 10];
      MIXED.forEach(([a, b, c, d], k) => {
        for (const [half, first, second] of [[0, 32n, 24n], [1, 16n, 63n]]) {
          v[a] = v[a] + v[b] + message[order[2 * k + half]] & WORD;
          v[d] = rotated(v[d] ^ v[a], first);
          v[c] = v[c] + v[d] & WORD;
          v[b] = rotated(v[b] ^ v[c], second);
        }
      });
    }
    return state[0] ^ v[0] ^ v[8];
  }

  // MT19937, seeded by a 32-bit number (Matsumoto & Nishimura 1998).
  class Twister {
    constructor(seed) {
      this.state = new Uint32Array(624);
      this.state[0] = seed;
      for (let k = 1; k < 624; k++) {
        const last = this.state[k - 1];
        this.state[k] = Math.imul(last ^ last >>> 30, 1812433253) + k;
      }
      this.at = 624;
    }

    next() {
      const s = this.state;
      if (this.at === 624) {
        for (let k = 0; k < 624; k++) {
          const y = s[k] & 0x80000000 | s[(k + 1) % 624] & 0x7fffffff;
          s[k] = s[(k + 397) % 624] ^ y >>> 1 ^ (y & 1 ? 0x9908b0df : 0);
        }
        this.at = 0;
      }
      let y = s[this.at++];
      y ^= y >>> 11;
      y ^= y << 7 & 0x9d2c5680;
      y ^= y << 15 & 0xefc60000;
      return (y ^ y >>> 18) >>> 0;
    }

    float() { return (this.next() & 0xffffff) / 2 ** 24; }

    double() {  // 53 of 64 bits
      const high = this.next(), low = this.next();
      return ((high & 0x1fffff) * 2 ** 32 + low) / 2 ** 53;
    }
  }

  // PyTorch's normal_: pairs in blocks of 16 float32 numbers; below 16 numbers, pairs of float64.
  function normal(count, twister) {
    const out = new Float32Array(count);
    if (count < 16) {
      for (let k = 0; k < count; k += 2) {
        const turn = 2 * Math.PI * twister.double(), radius = Math.sqrt(-2 * Math.log1p(-twister.double()));
        out[k] = radius * Math.cos(turn);
        if (k + 1 < count) out[k + 1] = radius * Math.sin(turn);
      }
      return out;
    }
    const transform = (start) => {
      for (let k = start; k < start + 8; k++) {
        const radius = Math.sqrt(-2 * Math.log(1 - out[k])), turn = 2 * Math.PI * out[k + 8];
        out[k] = radius * Math.cos(turn);
        out[k + 8] = radius * Math.sin(turn);
      }
    };
    for (let k = 0; k < count; k++) out[k] = twister.float();
    for (let start = 0; start < count - 15; start += 16) transform(start);
    if (count % 16) {
      for (let k = count - 16; k < count; k++) out[k] = twister.float();
      transform(count - 16);
    }
    return out;
  }

  function ofImage(seed, image, count) {
    return normal(count, new Twister(Number(hash(`image/${seed}/${image}`) >> 1n & 0xffffffffn)));
  }

  return { ofImage };
})();
