package main

import (
	"context"
	"fmt"
	"time"

	"gonum.org/v1/plot/plotter"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

const (
	// few is how many timers a quiet server has.
	few = 1000
	// participantsPerRoom is how many of these timers are in one room.
	participantsPerRoom = 20
	// alternations is how many times the rates of two servers are measured in turn between a start and a stop.
	alternations = 3
)

// manyTimers compares servers with many timers, with few, and with none.
func (b *comparison) manyTimers(ctx context.Context) error {
	var (
		servers [3]*server
		tokens  [3][]string
	)
	for i, n := range []int{0, few, *many} {
		progress("%s: making %d timers", b.name, n)
		o, err := b.newOurs(ctx, fmt.Sprintf("timers-%d", i))
		if err != nil {
			return err
		}
		// The first start creates Dendrite's databases.
		if err = o.start(ctx); err != nil {
			return err
		}
		if err = o.Stop(); err != nil {
			return err
		}
		if tokens[i], err = fill(ctx, o.database, n, max(n/participantsPerRoom, 1), nil); err != nil {
			return err
		}
		servers[i] = o
	}
	var lives []manyLife
	for round := range longRounds() {
		l, err := b.live(ctx, servers, tokens)
		if err != nil {
			return err
		}
		progress("%s: round %d of %d: start %s with none, %s with all; idle %.2f%% and %.2f%% of a CPU; after the start %d MiB with"+
			" none, %d MiB with all; after keep-alives %d MiB with few, %d MiB with all; %.0f/s with few, %.0f/s with all",
			b.name, round+1, longRounds(), l.started[0], l.started[2], l.cpu[0], l.cpu[2], l.after[0]>>20, l.after[2]>>20,
			l.loaded[1]>>20, l.loaded[2]>>20, l.rates[1][0].Y, l.rates[2][0].Y)
		lives = append(lives, l)
	}
	var rate, serverCost, databaseCost, started, memory, cpu []float64
	for _, l := range lives {
		for i := range l.rates[1] {
			rate = append(rate, l.rates[2][i].Y/l.rates[1][i].Y)
		}
		each := func(spent [3]time.Duration, i int) float64 { return float64(spent[i]) / l.answers[i] }
		serverCost = append(serverCost, each(l.server, 2)/each(l.server, 1))
		databaseCost = append(databaseCost, each(l.database, 2)/each(l.database, 1))
		started = append(started, (l.started[2] - l.started[0]).Seconds())
		memory = append(memory, max(
			float64(l.after[2]-l.after[0])/float64(*many), float64(l.loaded[2]-l.loaded[1])/float64(*many-few)))
		cpu = append(cpu, l.cpu[2]-l.cpu[0])
	}
	b.add(fmt.Sprintf("keep-alives per second with %d timers / with %d", *many, few), "≥ 0.90", "", rate)
	b.add(fmt.Sprintf("CPU time of the server for a keep-alive with %d timers / with %d", *many, few), "", "", serverCost)
	if b.cluster != nil {
		b.add(fmt.Sprintf("CPU time of the database for a keep-alive with %d timers / with %d", *many, few), "", "", databaseCost)
	}
	b.add("memory per running timer, after the start or after keep-alives, whichever is more", "≤ 500 bytes", " bytes", memory)
	b.add(fmt.Sprintf("start with %d timers, longer than with none by", *many), "≤ 3 s", " s", started)
	b.add(fmt.Sprintf("idle with %d timers, more of a CPU than with none", *many), "nothing measurable", " %", cpu)
	if err := b.watchStart(ctx, servers[2].database); err != nil {
		return err
	}
	d := drawing{title: "Keep-alives by the number of running timers", x: "turn", y: "keep-alives per second", points: true}
	for i, n := range []int{few, *many} {
		l := line{name: fmt.Sprintf("%d timers", n)}
		for _, life := range lives {
			for _, p := range life.rates[i+1] {
				l.points = append(l.points, plotter.XY{X: float64(len(l.points) + 1), Y: p.Y})
			}
		}
		d.lines = append(d.lines, l)
	}
	return b.plot("many-timers", d)
}

// watchStart starts the engine in this process, twice, and adds to the report what it does.
func (b *comparison) watchStart(ctx context.Context, d database) error {
	start := func() (err error) {
		store, closeStore, err := openStore(ctx, d.timers)
		if err != nil {
			return err
		}
		defer closeStore()
		timers := expiration.New(expiration.Config{}, store, new(instantRoomserver), d.keys)
		defer timers.Stop()
		return timers.Start(ctx)
	}
	if err := b.cores("start", nil, start); err != nil {
		return err
	}
	return b.profiledHere("start", start)
}

// manyLife has the measurements of one run of the three servers, with none, few and many timers.
type manyLife struct {
	started [3]time.Duration
	after   [3]int64 // memory after the start
	loaded  [3]int64 // memory after keep-alives
	cpu     [3]float64
	rates   [3]plotter.XYs
	// server and database are the CPU times of the keep-alives, and answers is their number.
	server, database [3]time.Duration
	answers          [3]float64
}

// live starts the servers one after the other, lets them idle, makes keep-alives in turn to those with timers, and stops them all.
func (b *comparison) live(ctx context.Context, servers [3]*server, tokens [3][]string) (l manyLife, err error) {
	for i, s := range servers {
		if err = s.start(ctx); err != nil {
			return l, err
		}
		defer s.Kill()
		l.started[i] = s.started
	}
	<-time.After(*idle / 2) // until what loading took is given back to the operating system
	for i, s := range servers {
		if l.after[i], err = s.memory(); err != nil {
			return l, err
		}
	}
	if l.cpu, err = cpuOf(servers, *idle); err != nil {
		return l, err
	}
	for turns := range alternations {
		for i := range 2 {
			i = 1 + (i+turns)%2
			before, err := b.spent(servers[i])
			if err != nil {
				return l, err
			}
			own, err := refresh(ctx, servers[i].address, tokens[i], *turn, 0)
			if err != nil {
				return l, err
			}
			after, err := b.spent(servers[i])
			if err != nil {
				return l, err
			}
			l.answers[i] += float64(len(own.latencies))
			l.server[i] += after.server - before.server
			l.database[i] += after.database - before.database
			l.rates[i] = append(l.rates[i], plotter.XY{Y: own.perSecond})
			memory, err := servers[i].memory()
			if err != nil {
				return l, err
			}
			l.loaded[i] = max(l.loaded[i], memory)
		}
	}
	return l, nil
}

// cpuOf returns the CPU usage of each server, in percent, during the given time.
func cpuOf(servers [3]*server, d time.Duration) (percent [3]float64, err error) {
	var before [3]time.Duration
	start := time.Now()
	for i, s := range servers {
		if before[i], err = s.cpu(); err != nil {
			return percent, err
		}
	}
	<-time.After(d)
	for i, s := range servers {
		after, err := s.cpu()
		if err != nil {
			return percent, err
		}
		percent[i] = 100 * float64(after-before[i]) / float64(time.Since(start))
	}
	return percent, nil
}
