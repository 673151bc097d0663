package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"slices"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"gonum.org/v1/plot/plotter"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/test/homeserver"
)

const (
	// closingUsers is how many users send state events in each room.
	closingUsers = 4
	// closingPoll is how often the closings are counted, and endPoll how often at the beginning and towards the end. Each count costs the
	// server several milliseconds, and the load generator more.
	closingPoll = 500 * time.Millisecond
	endPoll     = 100 * time.Millisecond
	// closingTimeout limits the time of all closings together.
	closingTimeout = 15 * time.Minute
	// settlePoll is how long both servers have to be idle before a measurement, and settleTimeout how long the wait for that may take.
	settlePoll    = time.Second
	settleTimeout = 5 * time.Minute
	// prepareAtOnce is how many sends create the state at the same time, on both servers. It is the greatest concurrency that stock Dendrite
	// is measured with. Overlapping sends fork the event graph, and Dendrite then stores the state as one block, so each room's state is in
	// few blocks. Sequential sends would leave one block each.
	prepareAtOnce = 64
)

// concurrencies are the numbers of concurrent sends that stock Dendrite is measured with.
var concurrencies = []int{1, 4, 16, prepareAtOnce}

func (b *comparison) closingsInRooms(ctx context.Context) error {
	return b.compareClosings(ctx, "closings-in-rooms", *closings, *roomCount,
		fmt.Sprintf("closings per second, %d in %d rooms", *closings, *roomCount))
}

func (b *comparison) closingsInOneRoom(ctx context.Context) error {
	return b.compareClosings(ctx, "closings-in-one-room", *closingsInRoom, 1,
		fmt.Sprintf("closings per second, %d in one room", *closingsInRoom))
}

// compareClosings compares closings per second on our server, when n events expire at once, with sends per second on stock Dendrite. Stock
// Dendrite replaces as many pieces of state in as many rooms by plain events, at its best concurrency.
func (b *comparison) compareClosings(ctx context.Context, name string, n, rooms int, what string) error {
	pprof, stop, err := b.startBoth(ctx)
	if err != nil {
		return err
	}
	defer stop()
	progress("%s: making rooms for %s", b.name, what)
	crowds := [2]*crowd{}
	for i, s := range []*server{b.own, b.stock} {
		if crowds[i], err = newCrowd(ctx, s, name, rooms, closingUsers); err != nil {
			return err
		}
	}
	at, err := b.bestConcurrency(ctx, crowds[1], n)
	if err != nil {
		return err
	}
	var ratios, built, roomserver, stock []float64
	d := drawing{title: fmt.Sprintf("%d events in %d rooms", n, rooms), x: "time (s)", y: "events"}
	for round := range longRounds() {
		var closing, sending stages
		closed, err := b.massExpiry(ctx, crowds[0], n, round, func(wait func() error) (err error) {
			closing, err = stagesOf(ctx, b.own, wait)
			return err
		})
		if err != nil {
			return err
		}
		sent, err := b.stockSends(ctx, crowds[1], n, round, at, func(send func() error) (err error) {
			sending, err = stagesOf(ctx, b.stock, send)
			return err
		})
		if err != nil {
			return err
		}
		first, last := closed[0], closed[len(closed)-1]
		rate := (last.Y - first.Y) / last.X
		ratios = append(ratios, rate/sent)
		built, roomserver = append(built, 100*closing.built.Seconds()/last.X), append(roomserver, 100*closing.roomserver.Seconds()/last.X)
		stock = append(stock, 100*sending.roomserver.Seconds()*sent/float64(n))
		progress("%s: round %d of %d: %.0f closings per second, for %.1f s; stock sends %.0f per second, with %d at a time",
			b.name, round+1, longRounds(), rate, last.X, sent, at)
		d.lines = []line{
			{"closings after a mass expiry", closed},
			{"sends of stock Dendrite, at its best", plotter.XYs{{}, {X: last.Y / sent, Y: last.Y}}},
		}
	}
	b.add(what+" / sends of state by stock Dendrite", "≥ 1.0", "", ratios)
	if rooms == 1 { // one room's closing events are sent one after the other
		b.add(name+": an event is built for", "", " % of the time", built)
		b.add(name+": the roomserver has an event for", "", " % of the time", roomserver)
		b.add(name+": stock Dendrite's roomserver has an event for", "", " % of the time", stock)
	}
	if _, err = b.massExpiry(ctx, crowds[0], n, longRounds(), func(wait func() error) error {
		return b.cores(name, b.own, func() error { return b.profiled(ctx, name, pprof, wait) })
	}); err != nil {
		return err
	}
	return b.plot(name, d)
}

// massExpiry makes n pieces of expiring state and lets all of them expire at the same time. It returns the number of closings by time, in
// seconds since the first. It calls watch when the events expire. The function given to watch waits for the closings.
func (b *comparison) massExpiry(
	ctx context.Context, c *crowd, n, round int, watch func(wait func() error) error,
) (counts plotter.XYs, err error) {
	body := func(seconds int) homeserver.JSON {
		return homeserver.JSON{"round": round, "m.will_expire": seconds}
	}
	long := func() homeserver.JSON { return body(int(endless.Seconds())) }
	if _, err := c.sendState(ctx, 0, n, prepareAtOnce, long); err != nil {
		return nil, err
	}
	if err = b.settle(ctx); err != nil {
		return nil, err
	}
	// Sending the same content again makes no new event, but sets a new duration. A tenth of the events shows how long that takes.
	took, err := c.sendState(ctx, 0, max(n/10, 1), prepareAtOnce, long)
	if err != nil {
		return nil, err
	}
	before, err := b.own.closings(ctx)
	if err != nil {
		return nil, err
	}
	deadline := time.Now().Add(20*took + 3*time.Second)
	if _, err = c.sendState(ctx, 0, n, prepareAtOnce, func() homeserver.JSON {
		return body(max(int(math.Round(time.Until(deadline).Seconds())), 1))
	}); err != nil {
		return nil, err
	}
	<-time.After(time.Until(deadline) - time.Second) // because durations are rounded
	err = watch(func() (err error) {
		counts, err = countClosings(ctx, b.own, before, n)
		return err
	})
	return counts, err
}

// countClosings returns the number of closings by time, in seconds since the first, when all events are closed.
func countClosings(ctx context.Context, s *server, before float64, all int) (counts plotter.XYs, err error) {
	var (
		start = time.Now()
		first time.Time
	)
	for time.Since(start) < closingTimeout {
		n, err := s.closings(ctx)
		if err != nil {
			return nil, err
		}
		now := time.Now()
		n -= before
		if len(counts) == 0 || n == 0 { // the last count of zero, or else the first count, is the start
			first, counts = now, nil
		}
		counts = append(counts, plotter.XY{X: now.Sub(first).Seconds(), Y: n})
		if n >= float64(all) {
			if len(counts) == 1 {
				return nil, errors.New("all events expired before they were counted")
			}
			return counts, nil
		}
		pause := closingPoll
		if n == 0 || n >= .9*float64(all) {
			pause = endPoll
		}
		<-time.After(pause)
	}
	return nil, errors.New("not all events were closed")
}

// unwatched runs a function without measuring it.
func unwatched(do func() error) error { return do() }

// closings returns how many closing events the server has sent since its start.
func (s *server) closings(ctx context.Context) (float64, error) {
	metrics, err := s.metrics(ctx)
	if err != nil {
		return 0, err
	}
	var n float64
	for _, m := range metrics["dendrite_expiration_closings_total"].GetMetric() {
		n += m.GetCounter().GetValue()
	}
	return n, nil
}

// metrics returns the server's current metrics, by name.
func (s *server) metrics(ctx context.Context) (map[string]*dto.MetricFamily, error) {
	res, err := s.Anonymous().Do(ctx, http.MethodGet, "/metrics", nil)
	if err = must(res, err); err != nil {
		return nil, err
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	return parser.TextToMetricFamilies(bytes.NewReader(res.Body))
}

// stages are the total times that Dendrite needed for the parts of all sends.
type stages struct {
	built      time.Duration // built on the last event of the room according to the roomserver
	roomserver time.Duration // processed by the roomserver, one after the other in each room
}

// stagesOf calls work and returns the times of the server's sends meanwhile.
func stagesOf(ctx context.Context, s *server, work func() error) (stages, error) {
	before, err := s.stages(ctx)
	if err != nil {
		return stages{}, err
	}
	if err = work(); err != nil {
		return stages{}, err
	}
	after, err := s.stages(ctx)
	return stages{after.built - before.built, after.roomserver - before.roomserver}, err
}

func (s *server) stages(ctx context.Context) (all stages, err error) {
	metrics, err := s.metrics(ctx)
	if err != nil {
		return all, err
	}
	millis := func(m *dto.Metric) time.Duration {
		return time.Duration(m.GetHistogram().GetSampleSum() * float64(time.Millisecond))
	}
	for _, m := range metrics["dendrite_clientapi_sendevent_duration_millis"].GetMetric() {
		if slices.ContainsFunc(m.GetLabel(), func(l *dto.LabelPair) bool { return l.GetValue() == "build" }) {
			all.built += millis(m)
		}
	}
	for _, m := range metrics["dendrite_roomserver_processroomevent_duration_millis"].GetMetric() {
		all.roomserver += millis(m)
	}
	return all, nil
}

// bestConcurrency returns the number of concurrent sends with which stock Dendrite is fastest.
func (b *comparison) bestConcurrency(ctx context.Context, c *crowd, n int) (best int, err error) {
	fastest := 0.0
	for _, at := range concurrencies {
		rate, err := b.stockSends(ctx, c, n, -at, at, unwatched)
		if err != nil {
			return 0, err
		}
		if rate > fastest {
			fastest, best = rate, at
		}
		progress("%s: stock sends %.0f per second with %d at a time", b.name, rate, at)
	}
	return best, nil
}

// stockSends creates n pieces of state, replaces them with the given concurrency, and returns the rate of the replacements in events per
// second. The function given to watch makes the replacements.
func (b *comparison) stockSends(
	ctx context.Context, c *crowd, n, round, at int, watch func(send func() error) error,
) (rate float64, err error) {
	send := func(replaces bool, at int) (took time.Duration, err error) {
		return c.sendState(ctx, 0, n, at, func() homeserver.JSON {
			return homeserver.JSON{"round": round, "replaces": replaces}
		})
	}
	if err = c.wake(ctx); err != nil {
		return 0, err
	}
	if _, err = send(false, prepareAtOnce); err != nil {
		return 0, err
	}
	if err = b.settle(ctx); err != nil {
		return 0, err
	}
	err = watch(func() error {
		took, err := send(true, at)
		rate = float64(n) / took.Seconds()
		return err
	})
	return rate, err
}

// settle waits until both servers are idle. A server still tells its users about events for a while after the sends, and that work would
// share the cores with the server that is measured. On PostgreSQL it also runs ANALYZE, as the database does by itself within a minute.
// Otherwise chance decides which database scans a whole table because the table was small at its last analysis.
func (b *comparison) settle(ctx context.Context) error {
	if b.cluster != nil {
		if err := b.cluster.Analyse(ctx); err != nil {
			return err
		}
	}
	for start, last := time.Now(), time.Duration(0); time.Since(start) < settleTimeout; <-time.After(settlePoll) {
		own, err := b.own.cpu()
		if err != nil {
			return err
		}
		stock, err := b.stock.cpu()
		if err != nil {
			return err
		}
		if own+stock-last < settlePoll/20 {
			return nil
		}
		last = own + stock
	}
	return errors.New("the servers did not come to rest")
}
