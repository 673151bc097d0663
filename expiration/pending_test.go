package expiration

import (
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// Timers that are pending: their row is being written, or their event is on its way into the room.

// insertion is how long insertions take in these tests.
const insertion = time.Second

// whilePending runs a test twice: with insertions that are slow before the row is written, and after it.
func whilePending(t *testing.T, test func(t *testing.T, w *world)) {
	t.Helper()
	for _, after := range []bool{false, true} {
		t.Run(fmt.Sprintf("written=%t", after), func(t *testing.T) {
			inWorld(t, Config{}, func(t *testing.T, w *world) {
				w.store.setInsertTakes(insertion, after)
				test(t, w)
			})
		})
	}
}

// scheduling is a call of Schedule.
type scheduling struct {
	delayID string
	err     error
}

// scheduleBehind calls Schedule in the background.
func (w *world) scheduleBehind(e Event, content string, delay time.Duration) <-chan scheduling {
	done := make(chan scheduling, 1)
	go func() {
		delayID, err := w.Schedule(w.t.Context(), e, Delayed{Content: []byte(content)}, delay, false)
		done <- scheduling{delayID, err}
	}()
	time.Sleep(insertion / 2)
	return done
}

// Whatever happens to the timers while one is being scheduled, the client's answer is true.
func TestScheduledWhileSomebodyLooks(t *testing.T) {
	s := StateKey{RoomID: "!room", Type: "m.call.member", Key: "key"}
	for name, look := range map[string]func(w *world) error{
		"list":          func(w *world) error { return w.lists(w.t.Context()) },
		"change a room": func(w *world) error { return w.RoomChanged(w.t.Context(), "!room") },
		"change state":  func(w *world) error { return w.StateChanged(w.t.Context(), s, "$other") },
		"send state":    func(w *world) error { w.StateSent(s, "$other"); return nil },
		"drop a sender": func(w *world) error {
			w.DropSender(w.t.Context(), "!room", bob, time.Now())
			return w.DeleteStopped(w.t.Context())
		},
	} {
		t.Run(name, func(t *testing.T) {
			whilePending(t, func(t *testing.T, w *world) {
				done := w.scheduleBehind(leave("key"), "left", 10*time.Second)
				require.NoError(t, look(w))
				scheduled := <-done
				require.NoError(t, scheduled.err)
				require.Nil(t, w.final(scheduled.delayID))
				require.NoError(t, w.RestartDelayed(t.Context(), scheduled.delayID, alice))
				time.Sleep(10 * time.Second)
				w.wantSent("left")
				w.wantFinal(scheduled.delayID, Final.Sent)
				w.wantNoRows()
			})
		})
	}
}

// The list waits for an event that is being scheduled.
func TestListWhileScheduling(t *testing.T) {
	whilePending(t, func(t *testing.T, w *world) {
		done := w.scheduleBehind(leave("key"), "left", 10*time.Second)
		events := w.list(alice, "")
		require.Len(t, events, 1)
		require.Equal(t, (<-done).delayID, events[0].DelayID)
	})
}

// If the room is purged while an event is being scheduled, the client can look up the result.
func TestFinalisedWhileScheduling(t *testing.T) {
	whilePending(t, func(t *testing.T, w *world) {
		done := w.scheduleBehind(leave("key"), "left", 10*time.Second)
		w.DropRoom(t.Context(), "!room")
		scheduled := <-done
		require.NoError(t, scheduled.err)
		w.wantFinal(scheduled.delayID, failed)
		time.Sleep(time.Minute)
		w.wantSent()
		w.wantNoRows()
	})
}

// The first request has written its row and will fail. The repeated request must not get its delay ID.
func TestRepeatedWhileSchedulingFails(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.store.setInsertTakes(insertion, true)
		w.store.set(true, failing("insert"))
		done := w.scheduleBehind(requested(leave("key"), 1), "left", 10*time.Second)
		delayID, err := w.Scheduled(t.Context(), RequestHash{1})
		require.NoError(t, err)
		require.ErrorIs(t, (<-done).err, errFault)
		require.Empty(t, delayID)
	})
}

// beginBehind begins an expiring state event in the background, and sends it when its timer is stored.
func (w *world) beginBehind(key string, d time.Duration) (Event, <-chan error) {
	e := Event{ID: "$begun", RoomID: "!room", Type: "m", StateKey: &key, Sender: alice}
	done := make(chan error, 1)
	go func() {
		p, err := w.Begin(w.t.Context(), e, d, false)
		if err == nil {
			w.roomserver.send(e)
			p.Activate(true)
		}
		done <- err
	}()
	time.Sleep(insertion / 2)
	return e, done
}

// Nothing that happens to the timers while an expiring event is on its way harms it.
func TestBegunWhileSomebodyLooks(t *testing.T) {
	s := StateKey{RoomID: "!room", Type: "m", Key: "key"}
	for name, look := range map[string]func(w *world) error{
		"change a room":  func(w *world) error { return w.RoomChanged(w.t.Context(), "!room") },
		"change state":   func(w *world) error { return w.StateChanged(w.t.Context(), s, "$other") },
		"remove state":   func(w *world) error { return w.StateRemoved(w.t.Context(), "$begun") },
		"refresh":        func(w *world) error { return w.Refresh(w.t.Context(), HashToken(w.Token("$begun"))) },
		"another leaves": func(w *world) error { w.DropSender(w.t.Context(), "!room", bob, time.Now()); return nil },
		"left before": func(w *world) error {
			w.DropSender(w.t.Context(), "!room", alice, time.Now().Add(-insertion))
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			whilePending(t, func(t *testing.T, w *world) {
				e, done := w.beginBehind("key", 10*time.Second)
				require.NoError(t, look(w))
				require.NoError(t, <-done)
				require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
				w.wantClosings()
				time.Sleep(11 * time.Second)
				w.wantClosings(e)
				w.wantNoRows()
			})
		})
	}
}

// A timer that is dropped while its event is on its way ends, and so does its row.
func TestDroppedWhileBeginning(t *testing.T) {
	for name, drop := range map[string]func(w *world){
		"purge":  func(w *world) { w.DropRoom(w.t.Context(), "!room") },
		"leave":  func(w *world) { w.DropSender(w.t.Context(), "!room", alice, time.Now()) },
		"redact": func(w *world) { w.DropEvent(w.t.Context(), "$begun", Redacted) },
	} {
		t.Run(name, func(t *testing.T) {
			whilePending(t, func(t *testing.T, w *world) {
				e, done := w.beginBehind("key", 10*time.Second)
				drop(w)
				require.NoError(t, <-done)
				require.NoError(t, w.DeleteStopped(t.Context()))
				require.ErrorIs(t, w.Refresh(t.Context(), w.hash(e)), ErrNotFound)
				w.wantNoRows()
				w.restart(0)
				time.Sleep(time.Minute)
				w.wantClosings()
			})
		})
	}
}

// The stream can report the end of an event before the roomserver has answered the event's sender.
func TestDroppedWhilePending(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := Event{ID: "$x", RoomID: "!room", Type: "m", Sender: "@alice:example.org"}
		p, err := w.Begin(t.Context(), e, time.Second, false)
		require.NoError(t, err)
		w.roomserver.send(e)
		w.DropEvent(t.Context(), e.ID, Redacted)
		p.Activate(true)
		require.ErrorIs(t, w.Refresh(t.Context(), w.hash(e)), ErrNotFound)
		require.Zero(t, w.store.len())
		time.Sleep(time.Minute)
		w.wantClosings()
	})
}

// If another user replaces the event while it is on its way, the timer is dropped soon after, and not only at the deadline.
func TestReplacedWhilePending(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		key := "key"
		e := Event{ID: "$begun", RoomID: "!room", Type: "m", StateKey: &key, Sender: alice}
		s, _ := e.State()
		p, err := w.Begin(t.Context(), e, time.Hour, false)
		require.NoError(t, err)
		require.NoError(t, w.StateChanged(t.Context(), s, "$other"), "the roomserver does not know the event yet")
		w.roomserver.send(e)
		w.roomserver.sendRemote("!room", "m", key)
		p.Activate(true)
		time.Sleep(lookAgainAfter + time.Millisecond)
		synctest.Wait()
		require.False(t, w.known(w.hash(e)))
	})
}

// A timer can be doubted while its row is still being written.
func TestDoubtedWhileBeginning(t *testing.T) {
	whilePending(t, func(t *testing.T, w *world) {
		e, done := w.beginBehind("key", time.Hour)
		s, _ := e.State()
		require.NoError(t, w.StateComes(t.Context(), s, "$other"))
		require.NoError(t, <-done)
		_, doubted := w.store.has(e.ID)
		require.True(t, doubted)
	})
}

// Two requests make one event, and storing its timer fails for the first. The second stores it.
func TestEqualEventsOfWhichOneFails(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.store.setInsertTakes(insertion, false)
		w.store.set(false, failing("insert"))
		e, done := w.beginBehind("key", time.Hour)
		second := make(chan error, 1)
		go func() {
			p, err := w.Begin(t.Context(), e, time.Hour, false)
			if err == nil {
				w.roomserver.send(e)
				p.Activate(true)
			}
			second <- err
		}()
		synctest.Wait()
		go func() { // the first insertion fails, the second does not
			time.Sleep(insertion)
			w.store.set(false, nil)
		}()
		require.ErrorIs(t, <-done, errFault)
		require.NoError(t, <-second)
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)))
	})
}

// A sender who hangs up during Schedule leaves no timer without a row, and no row without a timer.
func TestHangsUpWhileScheduling(t *testing.T) {
	whilePending(t, func(t *testing.T, w *world) {
		w.store.set(true, failing("insert"))
		ctx, hangUp := context.WithTimeout(t.Context(), insertion/2)
		defer hangUp()
		_, err := w.Schedule(ctx, leave("key"), Delayed{Content: []byte("left")}, time.Hour, false)
		require.ErrorIs(t, err, errFault)
		time.Sleep(lastPause)
		require.NoError(t, w.DeleteStopped(t.Context()))
		w.wantNoRows()
	})
}

// A panic while a row is being written leaves neither a timer nor a lock behind.
func TestPanicWhileBeginning(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.store.set(false, panicking("insert"))
		require.Panics(t, func() {
			_, _ = w.Begin(t.Context(), Event{ID: "$begun", RoomID: "!room", Sender: alice}, time.Hour, false)
		})
		require.Empty(t, w.timersIn("!room"))
		w.wantNoLocks()
		w.wantNoRows()
	})
}
