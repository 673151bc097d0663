package expiration

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
)

// The database hangs, and clients give up and try again.

// callers are clients that wait for an answer, and may hang up.
type callers struct {
	wg      sync.WaitGroup
	waiting atomic.Int64

	mu   sync.Mutex // guards errs
	errs []error
}

// call calls f as one more client.
func (c *callers) call(f func() error) {
	c.waiting.Add(1)
	c.wg.Go(func() {
		err := f()
		c.mu.Lock()
		c.errs = append(c.errs, err)
		c.mu.Unlock()
		c.waiting.Add(-1)
	})
}

// wantWaiting requires that at most so many clients still wait.
func (c *callers) wantWaiting(t *testing.T, most int64) {
	t.Helper()
	synctest.Wait()
	require.LessOrEqual(t, c.waiting.Load(), most)
}

// wantSame requires that memory agrees with the row.
func (w *world) wantSame(h TokenHash, delayed bool) {
	w.t.Helper()
	synctest.Wait()
	w.mu.Lock()
	tm := w.byTokenWithMu(h, delayed)
	require.NotNil(w.t, tm)
	deadline, duration := tm.Deadline, tm.Duration
	w.mu.Unlock()
	row := w.store.row(tm.NID())
	require.NotNil(w.t, row)
	require.Equal(w.t, row.Deadline.UnixMilli(), deadline)
	require.Equal(w.t, row.Duration, duration)
}

// wantNoLocks requires that no caller holds or waits for a row's lock, and that no questions gather.
func (w *world) wantNoLocks() {
	w.t.Helper()
	synctest.Wait()
	require.Zero(w.t, w.rows.Len())
	require.Zero(w.t, w.refreshes.Len())
}

// While the database hangs, clients give up and try again. A client that hangs up waits no longer, unless its refresh is being written.
// When the database is back, the clients that still wait get right answers, and memory agrees with the rows.
func TestKeepAlivesWhileTheDatabaseHangs(t *testing.T) {
	const clients = 1000
	for name, number := range map[string]int{"one token": 1, "a few tokens": 7, "a token each": clients} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, Config{MaxRunningPerUser: clients}, func(t *testing.T, w *world) {
				var tokens []TokenHash
				for range number {
					tokens = append(tokens, w.hash(w.message("!room", time.Hour)))
				}
				release := w.store.hold()
				var c callers
				for range 5 { // each client tries five times
					ctx, hangUp := context.WithCancel(t.Context())
					for i := range clients {
						c.call(func() error { return w.Refresh(ctx, tokens[i%number]) })
					}
					time.Sleep(time.Second)
					hangUp()
					c.wantWaiting(t, 1)
				}
				for _, err := range c.errs {
					require.ErrorIs(t, err, batch.ErrNotAsked)
					require.ErrorIs(t, err, context.Canceled)
				}
				patient := time.Now()
				for i := range clients {
					c.call(func() error { return w.Refresh(t.Context(), tokens[i%number]) })
				}
				time.Sleep(10 * time.Second)
				before := len(c.errs)
				release()
				c.wg.Wait()
				for _, err := range c.errs[before:] {
					require.NoError(t, err)
				}
				for i := range clients {
					w.wantSame(tokens[i%number], false)
					row := w.store.row(w.find(tokens[i%number], false).NID())
					require.WithinDuration(t, patient.Add(time.Hour+10*time.Second), row.Deadline, 20*time.Second)
				}
				w.wantNoLocks()
				require.Zero(t, w.store.hanging())
			})
		})
	}
}

// The same holds for all other requests that use the database.
func TestClientsWhileTheDatabaseHangs(t *testing.T) {
	for name, ask := range map[string]func(ctx context.Context, w *world, delayID string) error{
		"restart": func(ctx context.Context, w *world, delayID string) error {
			return w.RestartDelayed(ctx, delayID, alice)
		},
		"cancel": func(ctx context.Context, w *world, delayID string) error { return w.CancelDelayed(ctx, delayID, alice) },
		"look up": func(ctx context.Context, w *world, delayID string) error {
			_, err := w.DelayedEvent(ctx, delayID, alice)
			return err
		},
		"list": func(ctx context.Context, w *world, _ string) error { return w.lists(ctx) },
		"repeat": func(ctx context.Context, w *world, _ string) error {
			_, err := w.Schedule(ctx, requested(leave("key"), 1), Delayed{Content: []byte("left")}, time.Hour, false)
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			inWorld(t, Config{}, func(t *testing.T, w *world) {
				delayID := w.schedule(requested(leave("key"), 1), "left", time.Hour)
				release := w.store.hold()
				defer release()
				var c callers
				for range 5 {
					ctx, hangUp := context.WithCancel(t.Context())
					for range 200 {
						c.call(func() error { return ask(ctx, w, delayID) })
					}
					time.Sleep(time.Second)
					hangUp()
					c.wantWaiting(t, 1)
				}
			})
		})
	}
}

// A claim that was given up before it was written was not written: the timer runs on, and can be refreshed.
func TestClaimThatIsGivenUp(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", time.Hour)
		tm := w.find(w.hash(e), false)
		ctx, giveUp := context.WithCancel(t.Context())
		giveUp()
		c := Claim{Outcome: Ended, Event: SignedEvent{EventID: "$closing", PDU: []byte("{}")}}
		err := w.claim(ctx, tm, 0, c)
		require.ErrorIs(t, err, batch.ErrNotAsked)
		require.False(t, maybeWritten(err))
		w.mu.Lock()
		unsure := tm.Has(index.RowUnsure)
		w.mu.Unlock()
		require.False(t, unsure)
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
		w.wantSame(w.hash(e), false)
	})
}

// A timer that is dropped while the database hangs loses its row when the database is back, although the caller gave up. It does not come
// back with a restart.
func TestDroppedWhileTheDatabaseHangs(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e, other := w.message("!room", time.Hour), w.message("!room", time.Hour)
		release := w.store.hold()
		var c callers
		refresh := make(chan error, 1)
		go func() { refresh <- w.Refresh(t.Context(), w.hash(e)) }() // holds the row's lock
		synctest.Wait()
		ctx, giveUp := context.WithCancel(t.Context())
		c.call(func() error { w.DropEvent(ctx, e.ID, Redacted); return w.DeleteStopped(ctx) })
		c.call(func() error { w.DropEvent(ctx, other.ID, Redacted); return w.DeleteStopped(ctx) })
		time.Sleep(time.Second)
		c.wantWaiting(t, 2)
		giveUp()
		release()
		c.wg.Wait()
		for _, err := range c.errs {
			require.Error(t, err, "not everything is written, so the stream must report it again")
		}
		require.NoError(t, <-refresh)
		for _, e := range []Event{e, other} {
			w.DropEvent(t.Context(), e.ID, Redacted)
		}
		time.Sleep(lastPause)
		require.NoError(t, w.DeleteStopped(t.Context()))
		w.wantNoRows()
		w.restart(0)
		require.False(t, w.known(w.hash(e)))
		require.False(t, w.known(w.hash(other)))
	})
}

// A sender who hangs up does not keep the doubts about the replaced timers from being written.
func TestStateComesFromOneWhoHangsUp(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.state("key", time.Hour)
		s, _ := e.State()
		ctx, hangUp := context.WithCancel(t.Context())
		hangUp()
		require.NoError(t, w.StateComes(ctx, s, "$newer"))
		_, doubted := w.store.has(e.ID)
		require.True(t, doubted)
	})
}

// A caller that gives up waiting for a row's lock leaves nothing behind and blocks no other.
func TestRowLocksObeyContexts(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		tm := w.find(w.hash(w.message("!room", time.Hour)), false)
		unlock, err := w.lockRow(t.Context(), tm)
		require.NoError(t, err)
		var c callers
		for range 100 {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			c.call(func() error {
				defer cancel()
				_, err := w.lockRow(ctx, tm)
				return err
			})
		}
		c.wg.Wait()
		for _, err := range c.errs {
			assert.True(t, errors.Is(err, batch.ErrNotAsked) && errors.Is(err, context.DeadlineExceeded))
		}
		unlock()
		w.wantNoLocks()
	})
}
