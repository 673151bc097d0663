package main

import (
	"context"
	"fmt"
	"math"
	"runtime"
	"time"

	"gonum.org/v1/plot/plotter"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// keepAlives compares keep-alives per second with three endpoints: the bare one, the one that commits batches, and the naive one. It also
// compares the latency of keep-alives with that of the database's commits.
func (b *comparison) keepAlives(ctx context.Context) error {
	o, err := b.newOurs(ctx, "keep-alives")
	if err != nil {
		return err
	}
	tokens, err := fill(ctx, o.database, few, few/participantsPerRoom, nil)
	if err != nil {
		return err
	}
	pprof, err := withPprof(func() error { return o.start(ctx) })
	if err != nil {
		return err
	}
	defer o.Kill()
	bare, stopBare, err := startSelf(ctx, "-serve-bare")
	if err != nil {
		return err
	}
	defer stopBare()
	var (
		toBare, toBareByMany, toNaive, bareToNaive []float64
		batchToBare                                []float64
		lateness, bareLateness, batchLateness      []float64
		costs, bareIdle                            []float64
		halves, commits                            []time.Duration
		rates                                      [4]plotter.XYs
	)
	for round := range *rounds {
		limitOfMany, err := refreshBy(ctx, manyConnections, bare, tokens, *turn, 0)
		if err != nil {
			return fmt.Errorf("the bare endpoint: %w", err)
		}
		ownOfMany, err := refreshBy(ctx, manyConnections, o.address, tokens, *turn, 0)
		if err != nil {
			return err
		}
		toBareByMany = append(toBareByMany, ownOfMany.perSecond/limitOfMany.perSecond)
		limit, limitEach, idle, err := b.counted(ctx, bare, tokens)
		if err != nil {
			return fmt.Errorf("the bare endpoint: %w", err)
		}
		own, ownEach, _, err := b.counted(ctx, o.address, tokens)
		if err != nil {
			return err
		}
		costs, bareIdle = append(costs, ownEach/limitEach), append(bareIdle, idle)
		toBare = append(toBare, own.perSecond/limit.perSecond)
		half, err := refresh(ctx, o.address, tokens, *turn, own.perSecond/2)
		if err != nil {
			return err
		}
		bareHalf, err := refresh(ctx, bare, tokens, *turn, own.perSecond/2)
		if err != nil {
			return fmt.Errorf("the bare endpoint: %w", err)
		}
		times, err := commitTimes(ctx, o.timers)
		if err != nil {
			return err
		}
		halves, commits = append(halves, half.latencies...), append(commits, times...)
		naive, err := b.committing(ctx, "-serve-naive", o.timers, tokens, 0)
		if err != nil {
			return fmt.Errorf("the naive endpoint: %w", err)
		}
		batch, err := b.committing(ctx, "-serve-batch", o.timers, tokens, 0)
		if err != nil {
			return fmt.Errorf("the bare endpoint with batches: %w", err)
		}
		batchHalf, err := b.committing(ctx, "-serve-batch", o.timers, tokens, own.perSecond/2)
		if err != nil {
			return fmt.Errorf("the bare endpoint with batches: %w", err)
		}
		batchToBare = append(batchToBare, batch.perSecond/limit.perSecond)
		toNaive, bareToNaive = append(toNaive, own.perSecond/naive.perSecond), append(bareToNaive, limit.perSecond/naive.perSecond)
		p99, commit := quantile(half.latencies, .99), median(times)
		lateness = append(lateness, float64(p99)/float64(commit))
		bareLateness = append(bareLateness, float64(quantile(bareHalf.latencies, .99))/float64(commit))
		batchLateness = append(batchLateness, float64(quantile(batchHalf.latencies, .99))/float64(commit))
		for i, l := range []load{limit, batch, own, naive} {
			rates[i] = append(rates[i], plotter.XY{X: float64(round + 1), Y: l.perSecond})
		}
		progress("%s: round %d of %d: %.0f/s bare, %.0f/s ours, %.0f/s bare with batches, %.0f/s naive; at half load p99 %s, a commit %s",
			b.name, round+1, *rounds, limit.perSecond, own.perSecond, batch.perSecond, naive.perSecond, p99, commit)
	}
	b.add(fmt.Sprintf("keep-alives per second / a bare endpoint, %d connections", connections), "≥ 0.60", "", toBare)
	b.add(fmt.Sprintf("keep-alives per second / a bare endpoint, %d connections", manyConnections), "", "", toBareByMany)
	b.add(fmt.Sprintf("a bare endpoint that commits batches / a bare endpoint, %d connections", connections), "", "", batchToBare)
	b.add("keep-alives per second / one transaction each", "≥ 10", "", toNaive)
	b.add("the bare endpoint / one transaction each", "", "", bareToNaive)
	b.add("p99 of a keep-alive at half of that load / the median of the database's own commit", "≤ 5", "", lateness)
	b.add("p99 of the bare endpoint at the same load / the median of the database's own commit", "", "", bareLateness)
	b.add("p99 of a bare endpoint that commits batches, at the same load / the median of the database's own commit", "", "", batchLateness)
	b.add("CPU time of a keep-alive, with its load and database / of a request to the bare endpoint, with its load", "", "", costs)
	b.add("keep-alives: nobody, while requests are made to the bare endpoint", "", " %", bareIdle)
	if err = b.cores("keep-alives", o, func() error {
		_, err := refresh(ctx, o.address, tokens, profileFor, 0)
		return err
	}); err != nil {
		return err
	}
	if err = b.profiled(ctx, "keep-alives", pprof, func() error {
		_, err := refresh(ctx, o.address, tokens, profileFor+time.Second, 0)
		return err
	}); err != nil {
		return err
	}
	if err = b.plot("keep-alives", drawing{
		title: fmt.Sprintf("Keep-alives by %d connections", connections), x: "round", y: "keep-alives per second", points: true,
		lines: []line{
			{"a bare endpoint", rates[0]}, {"a bare endpoint that commits batches", rates[1]}, {"ours", rates[2]}, {"one transaction each", rates[3]},
		},
	}); err != nil {
		return err
	}
	return b.plot("keep-alive-latency", drawing{
		title: "Latency of keep-alives at half of the greatest load", x: "latency (ms)", y: percent,
		lines: []line{shares("a keep-alive", halves), shares("a commit of the database alone", commits)},
	})
}

// counted is refresh. It also returns the CPU time of the whole machine for each answer, and how many percent of the time the cores were
// idle.
func (b *comparison) counted(ctx context.Context, address string, tokens []string) (l load, each, idle float64, err error) {
	before, err := b.spent(nil)
	if err != nil {
		return l, 0, 0, err
	}
	if l, err = refresh(ctx, address, tokens, *turn, 0); err != nil {
		return l, 0, 0, err
	}
	after, err := b.spent(nil)
	each = (after.all - before.all).Seconds() / float64(len(l.latencies))
	return l, each, 100 * (1 - each*l.perSecond/float64(runtime.NumCPU())), err
}

// committing measures one of the endpoints that only commit, with the rate of refresh. The endpoints use the table of our server, which
// gets no requests meanwhile.
func (b *comparison) committing(ctx context.Context, endpoint, timers string, tokens []string, rate float64) (load, error) {
	before, err := b.clients(ctx, timers)
	if err != nil {
		return load{}, err
	}
	address, stop, err := startSelf(ctx, endpoint, timers)
	if err != nil {
		return load{}, err
	}
	var l load
	if _, err = refresh(ctx, address, tokens, *turn, 0); err == nil { // the first call opens the endpoint's connections
		l, err = refresh(ctx, address, tokens, *turn, rate)
	}
	stop()
	// PostgreSQL needs some time to close the endpoint's connections, and does little else meanwhile.
	for now := math.MaxInt; err == nil && now > before; {
		<-time.After(clientsPoll)
		now, err = b.clients(ctx, timers)
	}
	return l, err
}

// clientsPoll is the interval between checks for closed connections.
const clientsPoll = 100 * time.Millisecond

// clients returns how many connections PostgreSQL has to a database, including that of this query.
func (b *comparison) clients(ctx context.Context, timers string) (n int, err error) {
	if b.cluster == nil {
		return 0, nil
	}
	return n, ask(ctx, timers, &n, "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
}

// commitTimes returns the durations of commits that refresh one timer, one after the other.
func commitTimes(ctx context.Context, timers string) (times []time.Duration, err error) {
	store, closeStore, err := openStore(ctx, timers)
	if err != nil {
		return nil, err
	}
	defer closeStore()
	all, err := renewals(ctx, store)
	if err != nil {
		return nil, err
	}
	for _, r := range all[:min(200, len(all))] {
		start := time.Now()
		r.Deadline = start.Add(endless)
		if _, err = store.Refresh(ctx, []expiration.Refresh{r}); err != nil {
			return nil, err
		}
		times = append(times, time.Since(start))
	}
	return times, nil
}
