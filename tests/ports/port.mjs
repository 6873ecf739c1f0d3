// The test harness of nf4.mjs (NF4-13.4): a JSON object a line on standard input, an answer on the output.
import { createInterface } from 'node:readline';
import * as nf4 from '../../reference/nf4/evidence/nf4.mjs';

/** NF4-13.2: digits begin with the highest byte, memory with the lowest: reverse bytes, then elements. */
const parse = (hex, Type) => new Type(new Uint8Array(Buffer.from(hex, 'hex').reverse()).buffer).reverse();
const format = (array) => Buffer.from(array.slice().reverse().buffer).reverse().toString('hex');

/** NF4-13.3: the types of fields, then the output fields and the function of each operation. */
const NESTED = { absmax_codes: Uint8Array, nested_absmax: Float32Array, offset: Float32Array };
const FIELDS = { codes: Uint8Array, absmax: Float32Array, ...NESTED, map: Float32Array };
const FLOATS = { float16: Uint16Array, bfloat16: Uint16Array, float32: Float32Array, float64: Float64Array };
const OPERATIONS = {
  codebook: [['values', 'thresholds'], (input) => nf4.codebook(input.codebook)],
  widen: [['y'], ({ x, dtype }) => ({ y: nf4.widen(x, dtype) })],
  narrow: [['y'], ({ x, dtype }) => ({ y: nf4.narrow(x, dtype) })],
  quantize: [['codes', 'absmax'], ({ x, ...layout }) => nf4.quantize(x, layout)],
  dequantize: [['y'], (tensor) => ({ y: nf4.dequantize(tensor) })],
  encode_absmax: [Object.keys(NESTED), ({ absmax }) => nf4.encode_absmax(absmax)],
  decode_absmax: [['absmax'], (scales) => ({ absmax: nf4.decode_absmax(scales) })],
  quantize_double: [['codes', ...Object.keys(NESTED)],
    ({ x, ...layout }) => nf4.quantize(x, { ...layout, double_quant: true })],
  dequantize_double: [['y'], (tensor) => ({ y: nf4.dequantize(tensor) })],
  storage: [['bytes'], (i) => ({ bytes: nf4.storage(i.elements, i.block_size, i.double_quant) })],
};

function answer(operation, input) {
  const [fields, run] = operation === 'echo' ? [['x'], (same) => same] : OPERATIONS[operation];
  const types = { ...FIELDS, x: operation === 'narrow' ? Float32Array : FLOATS[input.dtype] ?? Uint8Array };
  const read = ([name, value]) => [name, name in types ? parse(value, types[name]) : value];
  try {
    const result = run(Object.fromEntries(Object.entries(input).map(read)));
    const write = (value) => (ArrayBuffer.isView(value) ? format(value) : value);
    return { output: Object.fromEntries(fields.map((name) => [name, write(result[name])])) };
  } catch (error) {
    return error instanceof nf4.Refusal ? { refused: error.message } : { errored: String(error) };
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  const { cmd, id, operation, input } = JSON.parse(line);
  if (cmd === 'stop') break;
  const start = { version: 1, name: 'nf4.mjs', operations: Object.keys(OPERATIONS) };
  console.log(JSON.stringify(cmd === 'start' ? start : { id, ...answer(operation, input) }));
}
