package expiration

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// A due timer is attempted again if a send holds the lock of its state for longer than an attempt waits.
func TestAttemptsWaitForASend(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.state("key", 10*time.Second)
		delayID := w.schedule(leave("other"), "left", 10*time.Second)
		s, _ := e.State()
		unlock, err := w.LockState(t.Context(), s)
		require.NoError(t, err)
		s.Key = "other"
		unlockOther, err := w.LockState(t.Context(), s)
		require.NoError(t, err)
		time.Sleep(10*time.Second + 3*attemptTimeout)
		require.NoError(t, w.invariants())
		require.Nil(t, w.final(delayID))
		unlock()
		unlockOther()
		time.Sleep(lastPause + time.Second)
		w.wantClosings(e)
		w.wantSent("left")
	})
}

func TestRefreshWinsWhileTheClosingEventIsBuilt(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: takes(time.Second)})
		e := w.message("!room", 10*time.Second)
		time.Sleep(10*time.Second + 500*time.Millisecond)
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)), "not claimed yet")
		time.Sleep(10*time.Second + 500*time.Millisecond)
		w.wantClosings()
		time.Sleep(time.Second)
		w.wantClosings(e)
	})
}

// A closing event that was begun before a refresh must not be sent, because it bears a time at which the timer was not due. That holds even
// if building it took so long that the new deadline has passed as well.
func TestNothingBuiltBeforeARefreshIsSent(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{beforeClaim: takes(8 * time.Second)})
		e := w.message("!room", 4*time.Second)
		time.Sleep(5 * time.Second)
		require.NoError(t, w.Refresh(t.Context(), w.hash(e)), "the new deadline is 9 s after the start")
		time.Sleep(7 * time.Second)
		w.wantClosings()
		time.Sleep(8*time.Second - time.Nanosecond)
		w.wantClosings()
		time.Sleep(time.Nanosecond)
		w.wantClosings(e)
		require.Equal(t, 2, w.roomserver.attempts())
		require.WithinDuration(t, time.Now().Add(-11*time.Second), w.roomserver.closings()[0].sent, time.Millisecond, "the new deadline")
	})
}

func TestRefreshLosesAgainstAClaim(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{afterClaim: takes(time.Second)})
		e := w.message("!room", 10*time.Second)
		time.Sleep(10*time.Second + 500*time.Millisecond)
		require.ErrorIs(t, w.Refresh(t.Context(), w.hash(e)), ErrNotFound)
		time.Sleep(time.Second)
		w.wantClosings(e)
	})
}

func TestAfterTheClaimTheSameEventIsSentAgain(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{afterClaim: fails})
		e := w.state("key", 10*time.Second)
		time.Sleep(time.Minute)
		require.Equal(t, 1, w.roomserver.attempts(), "a second closing event was built")
		require.Error(t, w.End(t.Context(), w.hash(e)))
		w.restart(time.Second)
		require.Equal(t, 1, w.roomserver.attempts())
		w.roomserver.set(hooks{})
		time.Sleep(time.Minute)
		w.wantClosings(e)
		require.Equal(t, "$closing1", w.roomserver.closings()[0].eventID)
		require.Zero(t, w.store.len())
	})
}

// An original that was redacted after the claim gets no closing event, because that would publish the deleted content again.
func TestARedactionAfterTheClaim(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.roomserver.set(hooks{afterClaim: fails})
		e := w.message("!room", 10*time.Second)
		time.Sleep(11 * time.Second)
		w.DropEvent(t.Context(), e.ID, Redacted)
		w.roomserver.refuse(e.ID, Redacted)
		w.roomserver.set(hooks{})
		time.Sleep(time.Minute)
		require.Equal(t, 1, w.roomserver.attempts(), "it was claimed before")
		w.wantClosings()
		w.wantNoRows()
	})
}

// The closing event of an expired event bears the deadline, and never an earlier time, whenever it is built.
func TestTimeOfTheClosingEvent(t *testing.T) {
	const grace = 30 * time.Second
	inWorld(t, Config{RestartGrace: grace}, func(t *testing.T, w *world) {
		time.Sleep(300 * time.Microsecond) // the deadlines are not whole milliseconds
		sentAt := func(e Event) time.Time {
			t.Helper()
			synctest.Wait()
			for _, c := range w.roomserver.closings() {
				if c.closes == e.ID {
					return c.sent
				}
			}
			t.Fatal("no closing event")
			return time.Time{}
		}
		first := time.Now()
		late, refreshed := w.message("!a", 10*time.Second), w.message("!b", 10*time.Second)
		w.roomserver.set(hooks{beforeClaim: func(Event) error {
			if time.Since(first) < 12*time.Second {
				return errFault
			}
			return nil
		}})
		time.Sleep(5 * time.Second)
		require.NoError(t, w.Refresh(t.Context(), w.hash(refreshed)))
		time.Sleep(15 * time.Second)
		deadline := first.Add(10 * time.Second)
		require.False(t, sentAt(late).Before(deadline))
		require.Less(t, sentAt(late).Sub(deadline), time.Millisecond)
		require.Equal(t, w.stored(first.Add(15*time.Second)), sentAt(refreshed))

		atOnce := w.message("!a", time.Minute)
		time.Sleep(time.Second)
		require.NoError(t, w.End(t.Context(), w.hash(atOnce)))
		require.Equal(t, w.stored(time.Now()), sentAt(atOnce))

		// The deadline of a timer that expired while the server was down was put off. Other timers kept theirs.
		second := time.Now()
		overdue, later := w.message("!a", 10*time.Second), w.message("!b", 200*time.Second)
		w.restart(time.Minute)
		third := time.Now()
		time.Sleep(5 * time.Minute)
		require.Equal(t, w.stored(third.Add(grace)), sentAt(overdue))
		require.Equal(t, w.stored(second.Add(200*time.Second)), sentAt(later))
	})
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		deadline := time.Now().Add(10 * time.Second)
		w.message("!room", 10*time.Second)
		w.restart(time.Hour)
		synctest.Wait()
		require.Equal(t, w.stored(deadline), w.roomserver.closings()[0].sent)
	})
}

// A crash can leave an event stored, but not the current state until the roomserver goes on. Such an event must not count as replaced,
// because it would lose its timer.
func TestEventThatTheRoomserverHadNotFinished(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.begin("key", time.Second)
		w.roomserver.store(e)
		w.restart(time.Second)
		w.wantClosings(e)
	})
}

// A timer that ended while it waited in its lane does not wait for the lock of its state.
func TestEndedTimerWaitsForNoLock(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		first, second := w.state("key", 10*time.Second), w.message("!room", 11*time.Second)
		w.roomserver.set(hooks{beforeClaim: takes(3 * time.Second)})
		before := w.message("!room", 9*time.Second) // the room is busy when the next two are due
		time.Sleep(9500 * time.Millisecond)
		s, _ := first.State()
		unlock, err := w.LockState(t.Context(), s)
		require.NoError(t, err)
		defer unlock()
		time.Sleep(time.Second) // the first is in its lane
		w.roomserver.set(hooks{})
		w.DropEvent(t.Context(), first.ID, Redacted)
		time.Sleep(3 * time.Second)
		w.wantClosings(before, second)
	})
}
