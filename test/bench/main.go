// Command bench measures the cost of this server, side by side with upper bounds. It prints ratios, because absolute figures of one machine
// mean little on another. The machines are noisy, so the subjects are measured in turn, many times, and the median counts.
//
//	go run ./test/bench
//
// It starts its subjects on loopback, on SQLite and on PostgreSQL:
//
//   - this server
//   - stock Dendrite, in the version that this module depends on
//   - a bare net/http endpoint that decodes and encodes the same JSON and does nothing else, which is the upper bound of keep-alives
//   - the same endpoint with commits of batches, which is the upper bound of durable keep-alives
//   - the same endpoint with a transaction for each keep-alive, which is the naive way
//
// Progress, with the figures behind the ratios, goes to standard error. The table goes to standard output.
package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"time"

	"github.com/sirupsen/logrus"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/commandline"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/postgres"
)

var (
	rounds    = flag.Int("rounds", 7, "how many times each pair is measured; what takes long, half as many times")
	turn      = flag.Duration("turn", 2*time.Second, "how long each measurement of a rate or latency takes")
	many      = flag.Int("timers", 1_000_000, "how many timers are many")
	idle      = flag.Duration("idle", 10*time.Second, "for how long an idle server is watched")
	due       = flag.Int("due", 10_000, "how many timers are due within one second")
	closings  = flag.Int("closings", 1000, "how many events expire at once in many rooms")
	roomCount = flag.Int("rooms", 50, "over how many rooms these, and the timers due within one second, are spread")
	// Everything is slow in a large room: with a thousand events this part alone would take an hour.
	closingsInRoom = flag.Int("closings-in-room", 250, "how many events expire at once in one room")
	refreshes      = flag.Int("refreshes", 10_000_000, "how many keep-alives the database's size is watched for")
	only           = flag.String("only", "", "a regular expression: the parts to run, of all that -list names")
	list           = flag.Bool("list", false, "print the names of the parts")
	jsonFile       = flag.String("json", "", "a file for the results as JSON")
	plotDir        = flag.String("plots", "", "a folder for plots, as SVG")
)

// parts are the measurements on each database, in this order.
var parts = []struct {
	name string
	run  func(*comparison, context.Context) error
}{
	{"keep-alives", (*comparison).keepAlives},
	{"many-timers", (*comparison).manyTimers},
	{"claims", (*comparison).claims},
	{"sends", (*comparison).sends},
	{"closings-in-rooms", (*comparison).closingsInRooms},
	{"closings-in-one-room", (*comparison).closingsInOneRoom},
	{"growth", (*comparison).growth},
}

func main() {
	flag.Parse()
	if err := checkFlags(); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	logrus.SetOutput(io.Discard) // the log of the parts that run in this process
	run := bench
	switch {
	case *serveBare || *serveNaive != "" || *serveBatch != "":
		run = serve
	case *list:
		run = listParts
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// checkFlags refuses a command line that would measure nothing, or something else than the user intends.
func checkFlags() error {
	if err := commandline.NoArguments(flag.CommandLine, "the parts to run are named with -only"); err != nil {
		return err
	}
	chosen, err := regexp.Compile(*only)
	if err != nil {
		return err
	}
	for _, p := range parts {
		if chosen.MatchString(p.name) && *rounds > 0 {
			return nil
		}
	}
	return fmt.Errorf("nothing to measure: -only %q in %d rounds; -list names the parts", *only, *rounds)
}

func listParts(context.Context) error {
	for _, p := range parts {
		fmt.Println(p.name)
	}
	return nil
}

func bench(ctx context.Context) error {
	chosen, err := regexp.Compile(*only)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "msc4140-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	binaries, err := build(ctx, dir)
	if err != nil {
		return err
	}
	progress("starting PostgreSQL")
	cluster, err := postgres.Start(ctx)
	if err != nil {
		return err
	}
	defer cluster.Stop()
	report := &report{plots: *plotDir}
	for _, b := range []*comparison{{name: "SQLite"}, {name: "PostgreSQL", cluster: cluster}} {
		b.binaries, b.report, b.dir = binaries, report, filepath.Join(dir, b.name)
		for _, p := range parts {
			if !chosen.MatchString(p.name) {
				continue
			}
			start := time.Now()
			if err = p.run(b, ctx); err != nil {
				return fmt.Errorf("%s: %s: %w", b.name, p.name, err)
			}
			progress("%s: %s took %s", b.name, p.name, time.Since(start).Round(time.Second))
		}
	}
	fmt.Print(report.markdown())
	if *jsonFile == "" {
		return nil
	}
	return report.writeJSON(*jsonFile)
}

func progress(format string, args ...any) {
	fmt.Fprintf(os.Stderr, time.Now().Format("15:04:05 ")+format+"\n", args...)
}

// longRounds is the number of rounds of slow measurements.
func longRounds() int { return max(*rounds/2, 1) }

// comparison is the state of the measurements on one database.
type comparison struct {
	name     string
	dir      string
	binaries binaries
	cluster  *postgres.Cluster // nil for SQLite
	report   *report
	// own and stock are shared by all parts that compare with stock Dendrite. They are nil before the first of these parts.
	own, stock *server
}

// add adds a row to the table, from the values of all rounds.
func (b *comparison) add(what, goal, unit string, values []float64) {
	values = slices.Sorted(slices.Values(values))
	r := result{
		Database: b.name, What: what, Goal: goal, Unit: unit,
		Value: (values[(len(values)-1)/2] + values[len(values)/2]) / 2, Spread: [2]float64{values[0], values[len(values)-1]},
	}
	b.report.results = append(b.report.results, r)
	progress("%s: %s: %.3g%s", b.name, what, r.Value, unit)
}

// plot draws lines, if the user asks for plots.
func (b *comparison) plot(name string, d drawing) error {
	d.title += ", " + b.name
	return b.report.draw(b.name, name, d)
}
