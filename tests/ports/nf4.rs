//! NF4 in Rust, an example port: chapters 2 to 7 of the specification, and the harness of chapter 13.
//! `rustc --edition 2021 -O nf4.rs` builds it, `nf4 conform -- ./nf4` checks it. Apache-2.0.
//! An `Err` is a refusal and its reason (NF4-1.7); a panic is a fault of the harness or of what it is asked.
#![cfg_attr(rustfmt, rustfmt_skip)] // short functions have one line

/// NF4-2.1: the tables by name; another name is refused.
fn codebook(name: &str) -> Result<Vec<f32>, String> {
    let fp4 = [0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0].map(|k: f32| k / 12.0);
    let e2m1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0].map(|k: f32| k / 6.0);
    match name {
        "nf4" => Ok(floats("bf800000bf3239b1bf066b30beca32a0be91a24dbe3d353fbdba787100000000\
            3da2faff3e24cae33e7c04dd3ead033a3ee1a4b83f1007ab3f3913b33f800000")),
        "fp4" => Ok([fp4, fp4.map(|v| 0.0 - v)].concat()), // 0 - 0 is +0
        "fp4-e2m1" => Ok([e2m1, e2m1.map(|v| -v)].concat()),
        "int4" => Ok((0..16).map(|code| (code.min(14) - 7) as f32 / 7.0).collect()),
        _ => Err(format!("no codebook {name}")),
    }
}
/// NF4-2.2: the code of each rank, and the thresholds, which are the rounded midpoints of neighbours.
fn ranks(values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let mut ranks: Vec<(f32, u8)> = values.iter().copied().zip(0..=255).collect();
    ranks.sort_by(|a, b| a.partial_cmp(b).unwrap()); // of equal values the lowest code is first, and stays
    ranks.dedup_by_key(|rank| rank.0);
    let middle = |pair: &[(f32, u8)]| ((pair[0].0 as f64 + pair[1].0 as f64) / 2.0) as f32;
    (ranks.iter().map(|rank| rank.1).collect(), ranks.windows(2).map(middle).collect())
}

/// NF4-3.1, NF4-3.2, NF4-3.3, NF4-3.4, NF4-3.5: the code of each element, not yet packed, and absmax of each block.
fn encode(x: &[f32], size: usize, values: &[f32]) -> (Vec<u8>, Vec<f32>) {
    let ((ranked, thresholds), mut codes, mut scales) = (ranks(values), vec![], vec![]);
    for block in x.chunks(size) {
        let absmax = block.iter().fold(0.0, |most: f32, v| most.max(v.abs()));
        let boost = if (1.0 / absmax).is_infinite() { (1u128 << 64) as f32 } else { 1.0 }; // where <= 2^-128
        let reciprocal = if absmax == 0.0 { 0.0 } else { 1.0 / (absmax * boost) };
        codes.extend(block.iter().map(|v| ranked[thresholds.partition_point(|&t| t < v * boost * reciprocal)]));
        scales.push(absmax);
    }
    (codes, scales)
}
/// NF4-5.1 and NF4-5.2: the packed codes, and absmax of each block.
fn quantize(x: &[f32], size: usize, values: &[f32]) -> Result<(Vec<u8>, Vec<f32>), String> {
    check_finite(x, "element")?;
    let (mut codes, absmax) = encode(x, size, values);
    codes.extend(encode(&[0.0], size, values).0); // the pad of an odd count; after an even one it has no pair
    Ok((codes.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect(), absmax))
}
/// NF4-4.1: RN(v * a) for n elements; lengths that do not fit are refused, and absmax not finite (NF4-12.5).
fn dequantize(codes: &[u8], absmax: &[f32], n: usize, size: usize, values: &[f32]) -> Result<Vec<f32>, String> {
    if codes.len() != n.div_ceil(2) || absmax.len() != n.div_ceil(size) { return Err("lengths do not fit".into()) }
    check_finite(absmax, "absmax")?;
    let nibbles = codes.iter().flat_map(|byte| [byte >> 4, byte & 15]).enumerate();
    Ok(nibbles.take(n).map(|(i, code)| values[code as usize] * absmax[i / size]).collect())
}
/// NF4-12.1 and NF4-12.5: refuses a NaN or an infinity, naming the first.
fn check_finite(values: &[f32], what: &str) -> Result<(), String> {
    values.iter().position(|v| !v.is_finite()).map_or(Ok(()), |i| Err(format!("{what} {i} is {}", values[i])))
}
/// NF4-5.4: the bytes of a quantized tensor of n elements.
fn storage(n: usize, size: usize, double_quant: bool) -> usize {
    let blocks = n.div_ceil(size);
    n.div_ceil(2) + if double_quant { blocks + 4 * blocks.div_ceil(256) + 4 } else { 4 * blocks }
}

/// NF4-6.2, codes 128 to 254: the others are 0 at 127, 1 at 255, and minus 127 + k at 127 - k.
const MAP: &str = "3513a3b7365a1a94370205ff37b2420638378034388aefb338ba1f4b3923d70b398ce70539c7e2823a016f003a1eecc1\
    3a3c6a803a59e83e3a7765ff3aa7ef9d3af1a9fc3b1db22d3b428f5c3b676c8a3b8624dd3b9893743bab020d3bbd70a43bcfdf3c3be24dd3\
    3bf4bc6a3c0395813c0ccccd3c1604183c1f3b643c3ae1483c68f5c33c8b851f3ca28f5c3cb9999a3cd0a3d73ce7ae133cfeb8523d0ae147\
    3d1666673d21eb853d2d70a33d38f5c23d447ae13d5000003d5b85203d670a3d3d728f5d3d7e147b3d84cccd3d8a8f5d3d9051eb3d96147b\
    3d9bd70b3da1999a3da75c2a3dad1eb83db2e1483db8a3d73dbe66673dc428f73dc9eb853ddb33343df800003e0a66663e18cccd3e273333\
    3e3599993e4400003e5266663e60cccd3e6f33333e7d99993e8600003e8d33333e9466663e9b999a3ea2cccc3eaa00003eb133323eb86666\
    3ebf999a3ec6cccc3ece00003ed533323edc66663ee399993eeacccc3ef200003ef933323f0033333f03cccd3f0766663f0b00003f0e999a\
    3f1233333f15cccd3f1966673f1d00003f20999a3f2433333f27cccd3f2b66673f2f00003f32999a3f3633333f39cccd3f3d66673f410000\
    3f44999a3f4833333f4bcccd3f4f66663f5300003f56999a3f5a33333f5dcccd3f6166663f6500003f68999a3f6c33333f6fcccd3f736666\
    3f7700003f7a999a3f7e3333";
/// NF4-6.1: RN of the exact mean. Binary digit i of the sum counts 2^(i - 150); a long division follows.
fn exact_mean(values: &[f32]) -> f32 {
    let (n, mut digits) = (values.len().max(1) as u64, [0; 320]);
    for bits in values.iter().map(|v| v.abs().to_bits()) {
        let exponent = (bits >> 23).max(1);
        digits[exponent as usize] += u64::from(bits - ((exponent - 1) << 23)); // the significand, all bits at once
    }
    for i in 1..319 { (digits[i], digits[i + 1]) = (digits[i] % 2, digits[i + 1] + digits[i] / 2) } // carry
    let (mut i, mut quotient, mut rest) = (320, 0, 0);
    while i > 0 && quotient < 1 << 24 { // up to one bit more than a float32 has
        (i, rest) = (i - 1, 2 * rest + digits[i - 1]);
        (quotient, rest) = (2 * quotient + rest / n, rest % n);
    }
    let up = quotient % 2 == 1 && (quotient % 4 == 3 || rest > 0 || digits[..i].contains(&1)); // ties to even
    f32::from_bits(quotient as u32 / 2 + u32::from(up) + ((i as u32) << 23))
}
/// NF4-6.3: the 8-bit codes, their absmax and the offset; what could not be decoded is refused (NF4-6.6).
fn encode_absmax(absmax: &[f32]) -> Result<(Vec<u8>, Vec<f32>, f32), String> {
    if !absmax.iter().all(|a| (0.0..f32::INFINITY).contains(a)) { return Err("not an absmax".into()) }
    let (offset, up) = (exact_mean(absmax), floats(MAP));
    let map = [up.iter().rev().map(|v| -v).collect(), vec![0.0], up, vec![1.0]].concat();
    let (codes, nested) = encode(&absmax.iter().map(|a| a - offset).collect::<Vec<f32>>(), 256, &map);
    decode_absmax(&codes, &nested, offset, &map).map(|_| (codes, nested, offset))
}
/// NF4-6.4: absmax of each block; lengths that do not fit are refused, and absmax not finite (NF4-12.5).
fn decode_absmax(codes: &[u8], nested: &[f32], offset: f32, map: &[f32]) -> Result<Vec<f32>, String> {
    if nested.len() != codes.len().div_ceil(256) || map.len() != 256 { return Err("lengths do not fit".into()) }
    let absmax: Vec<f32> = (0..codes.len()).map(|i| map[codes[i] as usize] * nested[i / 256] + offset).collect();
    check_finite(&absmax, "absmax").map(|_| absmax)
}

/// NF4-7.1: float16 or bfloat16 to float32, which is exact.
fn widen(bits: u32, dtype: &str) -> f32 {
    let (sign, magnitude) = ((bits & 0x8000) << 16, bits & 0x7fff);
    f32::from_bits(match (dtype, magnitude) {
        ("float32", _) => bits,
        ("bfloat16", 0..=0x7f80) => bits << 16,
        ("float16", 0..=0x7bff) => sign | (f32::from_bits(magnitude << 13) * (1u128 << 112) as f32).to_bits(),
        ("float16", 0x7c00) => sign | 0x7f800000,
        _ => sign | 0x7fc00000, // a NaN
    })
}
/// NF4-7.2 and NF4-7.3: float32 to another dtype, to nearest, ties to even.
fn narrow(x: f32, dtype: &str) -> u32 {
    let (sign, u) = ((x.to_bits() >> 16) & 0x8000, x.abs().to_bits());
    match dtype {
        "float32" => x.to_bits(),
        _ if x.is_nan() => sign | if dtype == "bfloat16" { 0x7fc0 } else { 0x7e00 },
        "bfloat16" => sign | ((u + 0x7fff + ((u >> 16) & 1)) >> 16),
        _ if x.abs() < 1.0 / 16384.0 => sign | ((x.abs() + 0.5).to_bits() - 0.5f32.to_bits()), // ulp 2^-24
        _ => sign | (((u + 0xfff + ((u >> 13) & 1)) >> 13) - (112 << 10)).min(0x7c00),
    }
}

/// NF4-13.2: the elements of an array, each of so many hexadecimal digits.
fn unhex(text: &str, digits: usize) -> impl Iterator<Item = u64> + '_ {
    (0..text.len()).step_by(digits).map(move |at| u64::from_str_radix(&text[at..at + digits], 16).unwrap())
}
/// NF4-13.2: an array of float32.
fn floats(text: &str) -> Vec<f32> { unhex(text, 8).map(|bits| f32::from_bits(bits as u32)).collect() }
/// NF4-13.2: a field of JSON, a string of the bits of the elements.
fn hex(name: &str, values: impl IntoIterator<Item = impl Into<u64>>, digits: usize) -> String {
    format!(r#""{name}":"{}""#, values.into_iter().map(|v| format!("{:0digits$x}", v.into())).collect::<String>())
}
/// NF4-13.4: the value of a key in JSON without spaces, where no string has a comma or an escape, and no list a list.
fn field<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    let (_, value) = line.split_once(&format!("\"{key}\":"))?;
    let end: &[char] = if value.starts_with('[') { &[']'] } else { &['"', ',', '}'] };
    value.strip_prefix(['[', '"']).unwrap_or(value).split(end).next()
}
/// NF4-13.3: the answer to a line that asks for an operation.
fn run(line: &str) -> Result<String, String> {
    let get = |key| field(line, key).unwrap_or("");
    let (operation, dtype) = (get("operation"), field(line, "dtype").unwrap_or("float32"));
    let digits = match dtype {
        "float32" => 8, "float16" | "bfloat16" => 4, "float64" if operation == "echo" => 16,
        _ => return Err(format!("no dtype {dtype}")), // NF4-12.2
    };
    let count = |text: &str| text.parse::<usize>().map_err(|_| format!("{text} is not a count"));
    let size = count(field(line, "block_size").unwrap_or("64"))?;
    if !size.is_power_of_two() || !(32..=4096).contains(&size) { return Err(format!("no block size {size}")) }
    let values = codebook(field(line, "codebook").unwrap_or("nf4"))?;
    let n = get("shape").split_terminator(',').try_fold(1, |n: usize, d| count(d).map(|d| n.saturating_mul(d)))?;
    let x: Vec<f32> = unhex(get("x"), digits).map(|bits| widen(bits as u32, dtype)).collect();
    let u8s = |key| unhex(get(key), 2).map(|byte| byte as u8).collect::<Vec<u8>>();
    let f32s = |key| floats(get(key));
    let hex32 = |name, y: &[f32]| hex(name, y.iter().map(|v| v.to_bits()), 8);
    let typed = |y: &[f32]| hex("y", y.iter().map(|&v| narrow(v, dtype)), digits);
    let decoded = |absmax: &[f32]| dequantize(&u8s("codes"), absmax, n, size, &values).map(|y| typed(&y));
    let nested = |absmax: &[f32]| encode_absmax(absmax).map(|(codes, nested, offset)| [
        hex("absmax_codes", codes, 2), hex32("nested_absmax", &nested), hex32("offset", &[offset])].join(","));
    let absmax = || decode_absmax(&u8s("absmax_codes"), &f32s("nested_absmax"), f32s("offset")[0], &f32s("map"));
    let output = match operation {
        "echo" => hex("x", unhex(get("x"), digits), digits),
        "codebook" => hex32("values", &values) + "," + &hex32("thresholds", &ranks(&values).1),
        "widen" => hex32("y", &x),
        "narrow" => typed(&f32s("x")),
        "quantize" | "quantize_double" => {
            if x.len() != n { return Err("the shape asks for another number of elements".into()) }
            let (codes, absmax) = quantize(&x, size, &values)?;
            let scales = if operation == "quantize" { hex32("absmax", &absmax) } else { nested(&absmax)? };
            hex("codes", codes, 2) + "," + &scales
        }
        "dequantize" => decoded(&f32s("absmax"))?,
        "dequantize_double" => decoded(&absmax()?)?,
        "encode_absmax" => nested(&f32s("absmax"))?,
        "decode_absmax" => hex32("absmax", &absmax()?),
        "storage" => format!(r#""bytes":{}"#, storage(count(get("elements"))?, size, get("double_quant") == "true")),
        _ => panic!("no operation {operation}"),
    };
    Ok(format!(r#""output":{{{output}}}"#))
}
const OPERATIONS: [&str; 10] = ["codebook", "widen", "narrow", "quantize", "dequantize", "encode_absmax",
    "decode_absmax", "quantize_double", "dequantize_double", "storage"];
/// NF4-13.4: answers each line of standard input; println! flushes at the end of a line.
fn main() {
    for line in std::io::stdin().lines().map(|line| line.expect("UTF-8").replace(' ', "")) {
        let (id, refused) = (field(&line, "id").unwrap_or(""), |reason| format!(r#""refused":"{reason}""#));
        match field(&line, "cmd") {
            Some("start") => println!(r#"{{"version":1,"name":"rust-example","operations":{OPERATIONS:?}}}"#),
            Some("run") => println!(r#"{{"id":"{id}",{}}}"#, run(&line).unwrap_or_else(refused)),
            _ => return,
        }
    }
}
