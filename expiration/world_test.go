package expiration

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/lanes"
)

const (
	alice = "@alice:example.org"
	bob   = "@bob:example.org"
)

// world is an engine with fakes around it, under fake time.
type world struct {
	*Timers
	t          *testing.T
	store      *memoryStore
	roomserver *fakeRoomserver
	events     int
	secret     string
	loaded     func()       // if not nil, called after loading and before the engine runs
	step       atomic.Int64 // how far the wall clock is set forward or back
	earlyEvery int          // for the lanes; 0 is 1, with which all turns that may be early are
}

// inWorld runs a test under fake time.
func inWorld(t *testing.T, cfg Config, test func(t *testing.T, w *world)) {
	synctest.Test(t, func(t *testing.T) {
		cfg.MaxRunningPerUser = cmp.Or(cfg.MaxRunningPerUser, 100)
		cfg.MaxScheduledPerUser = cmp.Or(cfg.MaxScheduledPerUser, 100)
		cfg.MaxScheduledPerServiceUser = cmp.Or(cfg.MaxScheduledPerServiceUser, 1000)
		cfg.KeepFinalised, cfg.MaxFinalisedPerUser = cmp.Or(cfg.KeepFinalised, 7*24*time.Hour), cmp.Or(cfg.MaxFinalisedPerUser, 1000)
		w := &world{t: t, store: newMemoryStore(), roomserver: newFakeRoomserver()}
		w.start(cfg)
		defer func() { w.Stop() }()
		test(t, w)
		require.NoError(t, w.invariants())
	})
}

// start starts a process on the stored timers.
func (w *world) start(cfg Config) {
	w.t.Helper()
	tokens, err := NewTokens([]byte(cmp.Or(w.secret, "secret")))
	require.NoError(w.t, err)
	cfg.Explain = explain
	w.Timers = New(cfg, w.store, w.roomserver, tokens)
	w.lanes = lanes.New(cmp.Or(w.earlyEvery, 1))
	w.clock.wall = func() time.Time { return time.Now().Round(0).Add(time.Duration(w.step.Load())) }
	if w.loaded == nil {
		require.NoError(w.t, w.Start(w.t.Context()))
		return
	}
	inherited, err := w.loadAll(w.t.Context())
	require.NoError(w.t, err)
	w.loaded()
	w.run(w.t.Context(), inherited)
}

// explain returns a refusal unchanged, and any other error as JSON.
func explain(err error) json.RawMessage {
	if refused := (*RefusedError)(nil); errors.As(err, &refused) {
		return refused.Response
	}
	return fmt.Appendf(nil, `{"error":%q}`, err)
}

// invariants returns the violated invariants of the index.
func (w *world) invariants() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.index.Invariants()
}

// restart ends the process at once, and starts the next one after the given time.
func (w *world) restart(down time.Duration) {
	w.t.Helper()
	w.stop()
	w.Stop()
	time.Sleep(down)
	w.start(w.cfg)
}

// stored returns a moment as the database keeps it.
func (w *world) stored(moment time.Time) time.Time {
	return w.clock.stored(moment.Sub(w.clock.start))
}

// message sends an expiring message to a room.
func (w *world) message(room string, d time.Duration) Event {
	w.t.Helper()
	w.events++
	e := Event{ID: fmt.Sprintf("$event%d", w.events), RoomID: room, Type: "m.room.message", Sender: "@alice:example.org"}
	w.send(e, d)
	return e
}

// state sends an expiring state event as the routes and the wrapper do.
func (w *world) state(key string, d time.Duration) Event {
	w.t.Helper()
	w.events++
	e := Event{
		ID: fmt.Sprintf("$event%d", w.events), RoomID: "!room", Type: "m.call.member", StateKey: &key,
		Sender: "@alice:example.org",
	}
	s, _ := e.State()
	unlock, err := w.LockState(w.t.Context(), s)
	require.NoError(w.t, err)
	defer unlock()
	require.NoError(w.t, w.StateComes(w.t.Context(), s, e.ID))
	w.send(e, d)
	w.StateSent(s, e.ID)
	return e
}

// begin writes the row of an expiring state event that the roomserver does not get, as after a crash.
func (w *world) begin(key string, d time.Duration) Event {
	w.t.Helper()
	e := Event{ID: "$begun", RoomID: "!room", Type: "m", StateKey: &key, Sender: "@alice:example.org"}
	_, err := w.Begin(w.t.Context(), e, d, false)
	require.NoError(w.t, err)
	return e
}

func (w *world) send(e Event, d time.Duration) {
	w.t.Helper()
	p, err := w.Begin(w.t.Context(), e, d, false)
	require.NoError(w.t, err)
	w.roomserver.send(e)
	p.Activate(true)
}

func (w *world) hash(e Event) TokenHash { return HashToken(w.Token(e.ID)) }

func (w *world) known(h TokenHash) bool { known, _ := w.Allow(h); return known }

func (w *world) knownDelayed(delayID string) bool { known, _ := w.AllowDelayed(delayID); return known }

// wantClosings requires that these events were closed once each, in this order.
func (w *world) wantClosings(events ...Event) {
	w.t.Helper()
	synctest.Wait()
	var got, want []string
	for _, c := range w.roomserver.closings() {
		got = append(got, c.closes)
	}
	for _, e := range events {
		want = append(want, e.ID)
	}
	require.Equal(w.t, want, got)
}

// wantNoRows requires that the rows of all timers are deleted in time.
func (w *world) wantNoRows() {
	w.t.Helper()
	time.Sleep(sweepPause)
	synctest.Wait()
	require.Zero(w.t, w.store.len())
}

// leave returns the delayed event of these tests: a state event of Alice in !room.
func leave(key string) Event {
	return Event{RoomID: "!room", Type: "m.call.member", StateKey: &key, Sender: alice}
}

// later returns a delayed event that is not state.
func later(room string) Event { return Event{RoomID: room, Type: "m.room.message", Sender: alice} }

// requested returns the event with a repeatable request.
func requested(e Event, n byte) Event {
	e.Request = &Request{Hash: RequestHash{n}}
	return e
}

// schedule schedules an event. The tests identify events by their content.
func (w *world) schedule(e Event, content string, delay time.Duration) (delayID string) {
	w.t.Helper()
	delayID, err := w.Schedule(w.t.Context(), e, Delayed{Content: []byte(content)}, delay, false)
	require.NoError(w.t, err)
	return delayID
}

// wantSent requires that the rooms have got these delayed events, in this order, each once.
func (w *world) wantSent(contents ...string) {
	w.t.Helper()
	synctest.Wait()
	var got []string
	for _, e := range w.roomserver.sent() {
		got = append(got, e.content)
	}
	require.Equal(w.t, contents, got)
}

// final returns the result of Alice's delayed event, or nil if it is scheduled.
func (w *world) final(delayID string) *Final {
	w.t.Helper()
	d, err := w.DelayedEvent(w.t.Context(), delayID, alice)
	require.NoError(w.t, err)
	require.Equal(w.t, delayID, d.DelayID)
	return d.Final
}

// wantFinal requires a result.
func (w *world) wantFinal(delayID string, is func(Final) bool) {
	w.t.Helper()
	f := w.final(delayID)
	require.NotNil(w.t, f, "still scheduled")
	require.True(w.t, is(*f), "%+v", f)
}

// wantErased requires that nothing is known of Alice's delayed events.
func (w *world) wantErased(delayIDs ...string) {
	w.t.Helper()
	for _, delayID := range delayIDs {
		_, err := w.DelayedEvent(w.t.Context(), delayID, alice)
		require.ErrorIs(w.t, err, ErrNotFound)
	}
}

// wantFinalised requires an error that contains the result of a delayed event.
func wantFinalised(t *testing.T, err error, is func(Final) bool) {
	t.Helper()
	var finalised *FinalisedError
	require.ErrorAs(t, err, &finalised)
	require.True(t, is(finalised.Final), "%+v", finalised.Final)
}

// failed reports whether a result is an error.
func failed(f Final) bool { return f.Error != nil }

// set sends a state event that neither expires nor is delayed, and reports it to the timers.
func (w *world) set(e Event, sender string) {
	w.t.Helper()
	w.events++
	e.ID, e.Sender = fmt.Sprintf("$event%d", w.events), sender
	w.roomserver.send(e)
	s, _ := e.State()
	w.StateSent(s, e.ID)
}

// setFault makes one operation of the roomserver ("build", "input") or of the store fail in passing, or none for "". written is as for
// memoryStore.set.
func (w *world) setFault(fault string, written bool) {
	var h hooks
	w.store.set(written, failing(fault))
	switch fault {
	case "build":
		h.beforeClaim = fails
	case "input":
		h.afterClaim = fails
	}
	w.roomserver.set(h)
}

// lists reads all of Alice's scheduled events, and returns the first error.
func (w *world) lists(ctx context.Context) error {
	for _, err := range w.DelayedEvents(ctx, alice, "") {
		if err != nil {
			return err
		}
	}
	return nil
}

// list returns a user's scheduled events after a place.
func (w *world) list(owner, after string) (events []DelayedEvent) {
	w.t.Helper()
	events = []DelayedEvent{}
	for e, err := range w.DelayedEvents(w.t.Context(), owner, after) {
		require.NoError(w.t, err)
		events = append(events, e)
	}
	return events
}
