package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"gonum.org/v1/plot/plotter"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration"
)

// claimTimeout is how long all claims together may take.
const claimTimeout = 5 * time.Minute

// claims measures how long after its deadline a timer is claimed, when many timers are due within one second. It runs the engine itself,
// with its real store, in this process. The roomserver takes no time, so the measured time is the engine's own.
func (b *comparison) claims(ctx context.Context) error {
	d, err := b.newDatabase(ctx, "claims")
	if err != nil {
		return err
	}
	var p99 []float64
	var last []claimTimes
	for round := range longRounds() {
		if last, err = claimAll(ctx, d, unwatched); err != nil {
			return err
		}
		begun, claimed := make([]time.Duration, len(last)), make([]time.Duration, len(last))
		for i, c := range last {
			begun[i], claimed[i] = c.begun, c.claimed
		}
		slices.Sort(begun)
		slices.Sort(claimed)
		p99 = append(p99, milliseconds(quantile(claimed, .99)))
		progress("%s: round %d of %d: after the deadline begun: median %s, p99 %s; claimed: median %s, p99 %s", b.name, round+1, longRounds(),
			quantile(begun, .5), quantile(begun, .99), quantile(claimed, .5), quantile(claimed, .99))
	}
	b.add(fmt.Sprintf("lateness of the claim, %d timers due within one second, p99", *due), "≤ 100 ms", " ms", p99)
	if _, err = claimAll(ctx, d, func(wait func() error) error { return b.cores("claims", nil, wait) }); err != nil {
		return err
	}
	if _, err = claimAll(ctx, d, func(wait func() error) error { return b.profiledHere("claims", wait) }); err != nil {
		return err
	}
	l := line{name: "claimed"}
	for _, c := range last {
		l.points = append(l.points, plotter.XY{X: milliseconds(c.due), Y: milliseconds(c.claimed)})
	}
	slices.SortFunc(l.points, func(a, b plotter.XY) int { return cmp.Compare(a.X, b.X) })
	l.points = thinned(l.points, 1000)
	return b.plot("claims", drawing{
		title: fmt.Sprintf("Lateness of the claim, %d timers due within one second", *due),
		x:     "deadline (ms since the first)", y: "from the deadline until the claim is committed (ms)", lines: []line{l},
	})
}

// claimTimes are the times of one timer: its deadline, relative to the first one, and how long after its deadline the attempt to claim it
// began and succeeded.
type claimTimes struct {
	due, begun, claimed time.Duration
}

// claimAll lets timers expire, and returns when all are claimed. It calls watch when the first is due. The function given to watch waits
// for the claims.
func claimAll(ctx context.Context, d database, watch func(wait func() error) error) ([]claimTimes, error) {
	lead := 2*time.Second + time.Duration(*due)*time.Millisecond/2 // the time in which the timers are made
	first := time.Now().Add(lead).Truncate(time.Millisecond)
	if _, err := fill(ctx, d, *due, *roomCount, func(i int) time.Time {
		return first.Add(time.Second * time.Duration(i) / time.Duration(*due))
	}); err != nil {
		return nil, err
	}
	store, closeStore, err := openStore(ctx, d.timers)
	if err != nil {
		return nil, err
	}
	defer closeStore()
	room := &instantRoomserver{first: first, done: make(chan struct{})}
	timers := expiration.New(expiration.Config{MaxRunningPerUser: 1}, store, room, d.keys)
	if err = timers.Start(ctx); err != nil {
		return nil, err
	}
	defer timers.Stop()
	if time.Now().After(first) {
		return nil, errors.New("the timers were due before they were all there")
	}
	<-time.After(time.Until(first))
	err = watch(func() error {
		select {
		case <-room.done:
			return nil
		case <-time.After(claimTimeout):
			return errors.New("the timers were not claimed")
		}
	})
	return room.times, err
}

// instantRoomserver is a roomserver that takes no time.
type instantRoomserver struct {
	first time.Time

	mu    sync.Mutex // guards times
	times []claimTimes
	done  chan struct{} // closed when all are claimed
}

var closingEvent = signedEvent("closing")

func (r *instantRoomserver) Close(ctx context.Context, e expiration.Event, _ expiration.Outcome, sent time.Time, _ bool, claim func(context.Context, expiration.SignedEvent) error) error {
	t := claimTimes{due: sent.Sub(r.first), begun: time.Since(sent)}
	if err := claim(ctx, expiration.SignedEvent{EventID: "$closing" + e.ID[len("$closing"):], RoomVersion: roomVersion, PDU: closingEvent}); err != nil {
		return err
	}
	t.claimed = time.Since(sent)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.times = append(r.times, t)
	if len(r.times) == *due {
		close(r.done)
	}
	return nil
}

func (r *instantRoomserver) Wake(context.Context, string) error { return nil }

func (r *instantRoomserver) Confirm(context.Context, expiration.Event) error { return nil }

func (r *instantRoomserver) Resubmit(context.Context, expiration.Timer, expiration.SignedEvent) error {
	return nil
}

func (r *instantRoomserver) Replaced(context.Context, expiration.Event) (bool, error) {
	return false, nil
}

func (r *instantRoomserver) CurrentState(context.Context, expiration.StateKey) (string, error) {
	return "", nil
}

func (r *instantRoomserver) Send(
	context.Context, expiration.Timer, expiration.Outcome, func(context.Context, expiration.Built) error,
) (string, error) {
	return "", errors.New("no event is delayed here")
}
