#!/bin/bash
# Issue 20: correctness of variants, times side by side, hardware counters, SASS. One GPU, about 150 s.
F=${F:-out}; K=$(dirname "$0"); [ -f $K/variants.py ] || K=k20_study
mkdir -p $F; export PYTHONPATH=src:${PYTHONPATH}
echo "== check"; timeout 90 python3 $K/check.py 2>&1 | tee $F/check.txt | tail -20
echo "== times"; timeout 110 python3 $K/time_variants.py --output $F/times.json --rounds 14 2>&1 | tee $F/times.txt | tail -30
echo "== peers"; timeout 40 python3 $K/peers.py $F/peers.json 2>&1 | tail -4
echo "== ncu"
for v in "int4 int" "int4 two_8x2" "int8 int"; do
  set -- $v
  timeout 40 ncu --clock-control none -k regex:^decode$ --launch-skip 2 --launch-count 1 --set full --import-source no -f -o $F/ncu_$1_$2 \
    python3 $K/profile_one.py $1 $2 > $F/ncu_$1_$2.log 2>&1 || tail -3 $F/ncu_$1_$2.log
  [ -f $F/ncu_$1_$2.ncu-rep ] || continue
  ncu -i $F/ncu_$1_$2.ncu-rep --page details > $F/ncu_$1_$2.txt 2>&1
  ncu -i $F/ncu_$1_$2.ncu-rep --page source --csv > $F/ncu_$1_$2.source.csv 2>&1
  ncu -i $F/ncu_$1_$2.ncu-rep --page raw --csv > $F/ncu_$1_$2.raw.csv 2>&1
  echo "$1 $2"; grep -E "Duration|SM Frequency|DRAM Throughput|Memory Throughput|Issue Slots Busy|No Eligible|Executed Ipc Active|Warp Cycles Per Issued|Issued Warp Per" $F/ncu_$1_$2.txt
done
echo "== budget with the NVRTC of this machine"; timeout 30 python3 benchmarks/instruction_budget.py --output $F/budget.json --recipes "int4;int8;fp8" --macros ELECT=0 2>&1 | tail -5
timeout 30 python3 benchmarks/instruction_budget.py --output $F/budget_int.json --recipes "int4;int8;fp8" --macros FEW=1,VINT=1 2>&1 | tail -5
