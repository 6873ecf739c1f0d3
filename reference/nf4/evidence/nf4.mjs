// NF4 in JavaScript, as the specification names things. Other dtypes than float32 (Float32Array) are bits in
// a Uint16Array. A float32 operation is one of float64, rounded by fround or by its Float32Array (NF4-1.2).
const rn = Math.fround;
const bitsOf = (floats) => new Uint32Array(floats.buffer, floats.byteOffset, floats.length);
const fromBits = (bits) => new Float32Array(Uint32Array.from(bits).buffer);
const DTYPES = new Map([['float32', Float32Array], ['float16', Uint16Array], ['bfloat16', Uint16Array]]);
const fromHex = (text) => fromBits(text.match(/\w+/g).map((word) => parseInt(word, 16)));

export class Refusal extends Error {} // NF4-1.7: thrown for what MUST be refused
const check = (condition, reason) => { if (!condition) throw new Refusal(reason); };
const checkFinite = (values, what) => values.forEach((v, i) => { // NF4-12.1, NF4-12.5
  if (!Number.isFinite(v)) throw new Refusal(`${what} ${i} is ${v}`);
});

/** NF4-2.2: the code of each rank of a table, and the thresholds between the ranks. */
function withRanks(values) {
  const ascending = [...values.keys()].sort((a, b) => values[a] - values[b] || a - b);
  const codes = ascending.filter((code, i) => values[code] !== values[ascending[i - 1]]);
  const thresholds = Float32Array.from(codes.slice(1), (code, j) => (values[codes[j]] + values[code]) / 2);
  return { values, codes, thresholds };
}

const FP4 = [0, 1 / 16, 8, 12, 4, 6, 2, 3], E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6];
const CODEBOOKS = new Map([ // NF4-2.1
  ['nf4', fromHex(`bf800000 bf3239b1 bf066b30 beca32a0 be91a24d be3d353f bdba7871 00000000
    3da2faff 3e24cae3 3e7c04dd 3ead033a 3ee1a4b8 3f1007ab 3f3913b3 3f800000`)],
  ['fp4', Float32Array.from([...FP4, ...FP4.map((v) => 0 - v)], (v) => v / 12)], // 0 - 0 is +0
  ['fp4-e2m1', Float32Array.from([...E2M1, ...E2M1.map((v) => -v)], (v) => v / 6)],
  ['int4', Float32Array.from({ length: 16 }, (_, code) => Math.min(code - 7, 7) / 7)],
].map(([name, values]) => [name, withRanks(values)]));
const HALF = fromHex(`3513a3b7 365a1a94 370205ff 37b24206 38378034 388aefb3 38ba1f4b 3923d70b 398ce705
39c7e282 3a016f00 3a1eecc1 3a3c6a80 3a59e83e 3a7765ff 3aa7ef9d 3af1a9fc 3b1db22d 3b428f5c 3b676c8a 3b8624dd
3b989374 3bab020d 3bbd70a4 3bcfdf3c 3be24dd3 3bf4bc6a 3c039581 3c0ccccd 3c160418 3c1f3b64 3c3ae148 3c68f5c3
3c8b851f 3ca28f5c 3cb9999a 3cd0a3d7 3ce7ae13 3cfeb852 3d0ae147 3d166667 3d21eb85 3d2d70a3 3d38f5c2 3d447ae1
3d500000 3d5b8520 3d670a3d 3d728f5d 3d7e147b 3d84cccd 3d8a8f5d 3d9051eb 3d96147b 3d9bd70b 3da1999a 3da75c2a
3dad1eb8 3db2e148 3db8a3d7 3dbe6667 3dc428f7 3dc9eb85 3ddb3334 3df80000 3e0a6666 3e18cccd 3e273333 3e359999
3e440000 3e526666 3e60cccd 3e6f3333 3e7d9999 3e860000 3e8d3333 3e946666 3e9b999a 3ea2cccc 3eaa0000 3eb13332
3eb86666 3ebf999a 3ec6cccc 3ece0000 3ed53332 3edc6666 3ee39999 3eeacccc 3ef20000 3ef93332 3f003333 3f03cccd
3f076666 3f0b0000 3f0e999a 3f123333 3f15cccd 3f196667 3f1d0000 3f20999a 3f243333 3f27cccd 3f2b6667 3f2f0000
3f32999a 3f363333 3f39cccd 3f3d6667 3f410000 3f44999a 3f483333 3f4bcccd 3f4f6666 3f530000 3f56999a 3f5a3333
3f5dcccd 3f616666 3f650000 3f68999a 3f6c3333 3f6fcccd 3f736666 3f770000 3f7a999a 3f7e3333 3f800000`);
const MAP = withRanks(Float32Array.of(...HALF.slice(0, 127).map((v) => -v).reverse(), 0, ...HALF)); // NF4-6.2

/** NF4-2.1: a codebook: its `values` by code, its `codes` by rank, and its `thresholds`. */
export function codebook(name) {
  check(CODEBOOKS.has(name), `no codebook ${name}`);
  return CODEBOOKS.get(name);
}

/** NF4-7.1: to float32. The exponents of float16 have another bias, which a product puts right. */
export function widen(x, dtype) {
  check(DTYPES.get(dtype) === x.constructor, `${x.constructor.name} is no array of ${dtype}`);
  if (dtype === 'float32') return x;
  const [infinity, shift, bias] = dtype === 'float16' ? [0x7c00, 13, 2 ** 112] : [0x7f80, 16, 1];
  return fromBits(Uint32Array.from(x, (u) => {
    const sign = (u & 0x8000) << 16, magnitude = u & 0x7fff;
    if (magnitude >= infinity) return sign | (magnitude > infinity ? 0x7fc00000 : 0x7f800000);
    return sign | bitsOf(fromBits([magnitude << shift]).map((v) => v * bias))[0];
  }));
}

/** NF4-7.2, NF4-7.3: from float32, to nearest, ties to even. */
export function narrow(x, dtype) {
  check(DTYPES.has(dtype), `dtype ${dtype}`);
  if (dtype === 'float32') return x;
  return Uint16Array.from(bitsOf(x), (u, i) => {
    const sign = (u >>> 16) & 0x8000, magnitude = u & 0x7fffffff;
    if (magnitude > 0x7f800000) return sign | (dtype === 'float16' ? 0x7e00 : 0x7fc0);
    if (dtype === 'bfloat16') return (u + 0x7fff + ((u >>> 16) & 1)) >>> 16;
    if (magnitude < 0x38800000) return sign | (Math.abs(x[i]) * 2 ** 24 + 2 ** 52 - 2 ** 52); // whole
    return sign | Math.min((magnitude - (112 << 23) + 0xfff + ((u >>> 13) & 1)) >>> 13, 0x7c00);
  });
}

/** NF4-3.2, NF4-3.3, NF4-3.4, NF4-3.5: the absmax of each block, and a code for each element, not packed. */
function encode(x, blockSize, { codes: codeOf, thresholds }) {
  const codes = new Uint8Array(x.length), absmax = new Float32Array(Math.ceil(x.length / blockSize));
  const blockOf = (i) => Math.floor(i / blockSize);
  x.forEach((v, i) => { absmax[blockOf(i)] = Math.max(absmax[blockOf(i)], Math.abs(v)); });
  x.forEach((v, i) => {
    const a = absmax[blockOf(i)], up = a <= 2 ** -128 ? 2 ** 64 : 1;
    const s = a === 0 ? 0 : rn(v * up * rn(1 / (a * up))); // products with up are exact
    codes[i] = codeOf.at(thresholds.findIndex((t) => t >= s)); // -1, where there is none, is the last
  });
  return { codes, absmax };
}

/** NF4-12.2, NF4-12.3, NF4-1.4: the number of elements, if there is such a tensor. */
function countElements(shape, dtype, blockSize) {
  check(DTYPES.has(dtype), `dtype ${dtype}`);
  check([32, 64, 128, 256, 512, 1024, 2048, 4096].includes(blockSize), `block size ${blockSize}`);
  const n = shape.reduce((product, size) => product * size, 1);
  check([...shape, n].every((v) => Number.isSafeInteger(v) && v >= 0), `shape [${shape}]`);
  return n;
}

/** NF4-3, NF4-5, and NF4-6 if `double_quant`: an array to a quantized tensor. */
export function quantize(x, { shape, dtype, block_size, codebook: name, double_quant = false }) {
  const n = countElements(shape, dtype, block_size), even = new Float32Array(x.length + (x.length % 2));
  check(x.length === n, `${x.length} elements for shape [${shape}]`);
  even.set(widen(x, dtype)); // NF4-5.2: where n is odd, a 0 follows, which changes no absmax
  checkFinite(even, 'element');
  const { codes, absmax } = encode(even, block_size, codebook(name));
  const packed = codes.slice(0, even.length / 2).map((_, k) => (codes[2 * k] << 4) | codes[2 * k + 1]);
  const scales = double_quant ? encode_absmax(absmax) : { absmax };
  return { shape, dtype, block_size, codebook: name, codes: packed, ...scales };
}

/** NF4-4: a quantized tensor to an array of its dtype. */
export function dequantize({ shape, dtype, block_size, codebook: name, codes, ...scales }) {
  const n = countElements(shape, dtype, block_size), { values } = codebook(name);
  const absmax = scales.absmax ?? decode_absmax(scales), blocks = Math.ceil(n / block_size);
  check(codes.length === Math.ceil(n / 2), `${codes.length} bytes of codes for ${n} elements`); // NF4-12.5
  check(absmax.length === blocks, `${absmax.length} absmax for ${blocks} blocks`);
  checkFinite(absmax, 'the absmax of block');
  const value = (i) => values[i % 2 === 0 ? codes[i / 2] >> 4 : codes[(i - 1) / 2] & 15];
  return narrow(new Float32Array(n).map((_, i) => value(i) * absmax[Math.floor(i / block_size)]), dtype);
}

/** NF4-6.1: the mean of floats that are not negative: exact in units of 2^-149, then rounded once. */
function exactMean(values) {
  const units = (u) => (u >>> 23 ? BigInt((u & 0x7fffff) | 0x800000) << BigInt((u >>> 23) - 1) : BigInt(u));
  const total = bitsOf(values).reduce((sum, u) => sum + units(u & 0x7fffffff), 0n);
  const count = BigInt(values.length || 1), shift = Math.max(0, (total / count).toString(2).length - 24);
  const divisor = count << BigInt(shift), quotient = total / divisor;
  const up = 2n * (total % divisor) + (quotient % 2n) > divisor ? 1 : 0; // a tie goes up where this is odd
  return fromBits([(shift << 23) + Number(quotient) + up])[0]; // a carry goes into the exponent, as it should
}

/** NF4-6.1, NF4-6.3, NF4-6.6: absmax to 8-bit codes, with their own absmax and the offset. */
export function encode_absmax(absmax) {
  check(absmax.every((a) => a >= 0 && a < Infinity), 'an absmax is negative or not finite');
  const offset = Float32Array.of(exactMean(absmax));
  const { codes, absmax: nested_absmax } = encode(absmax.map((a) => a - offset[0]), 256, MAP);
  const scales = { absmax_codes: codes, nested_absmax, offset, map: MAP.values };
  decode_absmax(scales); // refuses an infinity
  return scales;
}

/** NF4-6.4: what encode_absmax made, back to absmax. */
export function decode_absmax({ absmax_codes, nested_absmax, offset, map }) {
  const blocks = Math.ceil(absmax_codes.length / 256);
  check(nested_absmax.length === blocks && offset.length === 1 && map.length === 256, 'a wrong length');
  const product = (code, i) => rn(map[code] * nested_absmax[Math.floor(i / 256)]);
  const absmax = Float32Array.from(absmax_codes, (code, i) => product(code, i) + offset[0]);
  checkFinite(absmax, 'the decoded absmax of block');
  return absmax;
}

/** NF4-5.4: the bytes of a quantized tensor. */
export function storage(elements, block_size, double_quant) {
  const blocks = Math.ceil(countElements([elements], 'float32', block_size) / block_size);
  return Math.ceil(elements / 2) + (double_quant ? blocks + 4 * Math.ceil(blocks / 256) + 4 : 4 * blocks);
}
