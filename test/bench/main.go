// Command bench measures what keep-alives cost, side by side with what bounds them, and prints ratios: figures of one machine
// mean little on another, and these machines are noisy. What is compared is measured in turn, many times, and the median
// counts.
//
//	go run ./test/bench
//
// It starts what it compares on loopback: this server, on SQLite and PostgreSQL; a bare net/http endpoint that decodes and
// encodes the same JSON and does nothing, which is the limit; and an endpoint that makes one transaction of each keep-alive,
// which is the naive way.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
)

var (
	rounds   = flag.Int("rounds", 7, "how many times each pair is measured")
	turn     = flag.Duration("turn", 2*time.Second, "how long each measurement takes")
	many     = flag.Int("timers", 1_000_000, "how many timers are many")
	jsonFile = flag.String("json", "", "a file for the results as JSON")
)

// few is how many timers a quiet server has.
const few = 1000

// result is one line of the table.
type result struct {
	What  string  `json:"what"`
	Goal  string  `json:"goal"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
	// Spread is the least and the greatest value of a round.
	Spread [2]float64 `json:"spread"`
}

func main() {
	flag.Parse()
	ctx := context.Background()
	run := bench
	if *serveBare || *serveNaive != "" {
		run = serve
	}
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func bench(ctx context.Context) error {
	dir, err := os.MkdirTemp("", "msc4140-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	progress("building the server")
	binary, err := homeserver.Build(ctx, dir)
	if err != nil {
		return err
	}
	progress("starting PostgreSQL")
	cluster, err := postgres.Start(ctx)
	if err != nil {
		return err
	}
	defer cluster.Stop()
	var results []result
	for _, name := range []string{"SQLite", "PostgreSQL"} {
		b := &comparison{binary: binary, dir: filepath.Join(dir, name), results: &results}
		if err = os.Mkdir(b.dir, 0o700); err != nil {
			return err
		}
		b.db = sqlite(b.dir)
		if name == "PostgreSQL" {
			b.db = database{name: name}
			if b.db.dendrite, err = cluster.NewDatabase(ctx); err != nil {
				return err
			}
			if b.db.timers, err = cluster.NewDatabase(ctx); err != nil {
				return err
			}
		}
		if err = b.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	fmt.Print(asMarkdown(results))
	if *jsonFile == "" {
		return nil
	}
	data, err := json.MarshalIndent(results, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(*jsonFile, append(data, '\n'), 0o644)
}

func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format("15:04:05 ")+format+"\n", args...)
}

// asMarkdown returns the results as a table.
func asMarkdown(results []result) string {
	var b strings.Builder
	b.WriteString("| what | goal | median | least … greatest |\n| --- | --- | ---: | ---: |\n")
	for _, r := range results {
		fmt.Fprintf(&b, "| %s | %s | %.3g%s | %.3g … %.3g |\n", r.What, r.Goal, r.Value, r.Unit, r.Spread[0], r.Spread[1])
	}
	return b.String()
}

// comparison is what is measured on one database.
type comparison struct {
	binary, dir string
	db          database
	results     *[]result
}

func (b *comparison) add(what, goal, unit string, values []float64) {
	slices.Sort(values)
	r := result{
		What: b.db.name + ": " + what, Goal: goal, Unit: unit,
		Value: values[len(values)/2], Spread: [2]float64{values[0], values[len(values)-1]},
	}
	*b.results = append(*b.results, r)
	progress("%s: %.3g%s", r.What, r.Value, r.Unit)
}

func (b *comparison) run(ctx context.Context) error {
	tokens, err := fill(ctx, b.db.timers, few)
	if err != nil {
		return err
	}
	quiet, err := newOurs(b.binary, filepath.Join(b.dir, "quiet"), b.db)
	if err != nil {
		return err
	}
	if err = quiet.start(ctx); err != nil {
		return err
	}
	stopped := false
	stop := func() error {
		stopped = true
		return quiet.Stop()
	}
	defer func() {
		if !stopped {
			quiet.Kill()
		}
	}()
	if err = b.compareRates(ctx, quiet, tokens); err != nil {
		return err
	}
	if err = stop(); err != nil {
		return err
	}
	return b.manyTimers(ctx, quiet, tokens)
}

// compareRates compares keep-alives per second with those of the bare endpoint and of the naive one, and their latency
// with the database's own.
func (b *comparison) compareRates(ctx context.Context, o *ours, tokens []string) error {
	bare, stopBare, err := startSelf(ctx, "-serve-bare")
	if err != nil {
		return err
	}
	defer stopBare()
	var toBare, toNaive, lateness []float64
	for round := range *rounds {
		progress("%s: round %d of %d", b.db.name, round+1, *rounds)
		limit, err := refresh(ctx, bare, tokens, *turn, 0)
		if err != nil {
			return fmt.Errorf("the bare endpoint: %w", err)
		}
		own, err := refresh(ctx, o.address, tokens, *turn, 0)
		if err != nil {
			return err
		}
		toBare = append(toBare, own.perSecond/limit.perSecond)
		naive, err := b.naive(ctx, tokens)
		if err != nil {
			return fmt.Errorf("the naive endpoint: %w", err)
		}
		toNaive = append(toNaive, own.perSecond/naive.perSecond)
		half, err := refresh(ctx, o.address, tokens, *turn, own.perSecond/2)
		if err != nil {
			return err
		}
		commit, err := b.commitTime(ctx)
		if err != nil {
			return err
		}
		lateness = append(lateness, float64(half.quantile(.99))/float64(commit))
		progress("%.0f/s bare, %.0f/s ours, %.0f/s naive; at half load p99 %s, a commit %s",
			limit.perSecond, own.perSecond, naive.perSecond, half.quantile(.99), commit)
	}
	b.add("keep-alives per second / a bare endpoint", "≥ 0.60", "", toBare)
	b.add("keep-alives per second / one transaction each", "≥ 10", "", toNaive)
	b.add("p99 of a keep-alive at half of that load / the database's commit time", "≤ 5", "", lateness)
	return nil
}

// naive measures the naive endpoint. It has the same table, and nobody else writes meanwhile.
func (b *comparison) naive(ctx context.Context, tokens []string) (load, error) {
	address, stop, err := startSelf(ctx, "-serve-naive", b.db.timers)
	if err != nil {
		return load{}, err
	}
	defer stop()
	return refresh(ctx, address, tokens, *turn, 0)
}

// commitTime returns the median time of a commit that refreshes one timer, one after the other.
func (b *comparison) commitTime(ctx context.Context) (time.Duration, error) {
	store, closeStore, err := openStore(ctx, b.db.timers)
	if err != nil {
		return 0, err
	}
	defer closeStore()
	var times []time.Duration
	for i := range 200 {
		start := time.Now()
		if _, err = store.Refresh(ctx, []expiration.Refresh{{
			NID: int64(i) + 1, Duration: endless, Deadline: start.Add(endless),
		}}); err != nil {
			return 0, err
		}
		times = append(times, time.Since(start))
	}
	slices.Sort(times)
	return times[len(times)/2], nil
}

// manyTimers compares a server that has many timers with the same one when it has few.
func (b *comparison) manyTimers(ctx context.Context, quiet *ours, fewTokens []string) error {
	var rate, start, memory []float64
	for round := range max(*rounds/2, 1) {
		progress("%s: round %d of %d with %d timers", b.db.name, round+1, max(*rounds/2, 1), *many)
		if _, err := fill(ctx, b.db.timers, few); err != nil {
			return err
		}
		before, err := b.life(ctx, quiet, fewTokens)
		if err != nil {
			return err
		}
		tokens, err := fill(ctx, b.db.timers, *many)
		if err != nil {
			return err
		}
		after, err := b.life(ctx, quiet, tokens)
		if err != nil {
			return err
		}
		rate = append(rate, after.perSecond/before.perSecond)
		start = append(start, (after.started - before.started).Seconds())
		memory = append(memory, float64(after.memory-before.memory)/float64(*many-few))
	}
	b.add(fmt.Sprintf("keep-alives per second with %d timers / with %d", *many, few), "≥ 0.90", "", rate)
	b.add(fmt.Sprintf("start with %d timers, longer than with %d by", *many, few), "≤ 3 s", " s", start)
	b.add("memory per running timer", "≤ 200 bytes", " bytes", memory)
	return nil
}

// life is what is measured in one life of the server.
type life struct {
	perSecond float64
	started   time.Duration
	memory    int64
}

// life starts the server, measures, and stops it.
func (b *comparison) life(ctx context.Context, o *ours, tokens []string) (l life, err error) {
	if err = o.start(ctx); err != nil {
		return l, err
	}
	defer o.Kill()
	if l.memory, err = o.memory(); err != nil {
		return l, err
	}
	own, err := refresh(ctx, o.address, tokens, *turn, 0)
	if err != nil {
		return l, err
	}
	return life{perSecond: own.perSecond, started: o.started, memory: l.memory}, nil
}
