package expiration

import (
	"math/rand/v2"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// After a claim that failed and was written, the scheduler reads the row soon, however far the deadline is.
func TestUnsureClaimLongBeforeTheDeadline(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		delayID, e := w.schedule(leave("key"), "left", time.Hour), w.message("!room", time.Hour)
		w.store.set(true, failing("claim"))
		require.ErrorIs(t, w.SendDelayed(t.Context(), delayID, alice), errFault)
		require.ErrorIs(t, w.End(t.Context(), w.hash(e)), errFault)
		w.store.set(false, nil)
		time.Sleep(time.Minute)
		w.wantSent("left")
		w.wantClosings(e)
	})
}

// A timer that is claimed while it is pending is carried out when it is activated, although only a lookup found the claim.
func TestClaimOfAPendingTimer(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.events++
		e := Event{ID: "$pending", RoomID: "!room", Type: "m.room.message", Sender: alice}
		p, err := w.Begin(t.Context(), e, time.Hour, false)
		require.NoError(t, err)
		w.roomserver.send(e)
		w.store.set(true, failing("claim"))
		require.ErrorIs(t, w.End(t.Context(), w.hash(e)), errFault)
		w.store.set(false, nil)
		require.ErrorIs(t, w.Refresh(t.Context(), w.hash(e)), ErrNotFound)
		p.Activate(true)
		require.NoError(t, w.invariants())
		time.Sleep(time.Minute)
		w.wantClosings(e)
	})
}

// A lookup that began before the output stream reported a change does not settle the doubt that the report raised.
func TestLookupOlderThanTheDoubt(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.state("key", time.Hour)
		s, _ := e.State()
		require.NoError(t, w.StateChanged(t.Context(), s, "$other")) // raises the first doubt
		w.roomserver.set(hooks{looked: takes(3 * time.Second)})
		time.Sleep(2 * time.Second) // the scheduler's lookup has read the old state
		w.roomserver.set(hooks{})
		require.NoError(t, w.StateChanged(t.Context(), s, "$newer"), "the stream is ahead of the roomserver's database")
		w.roomserver.send(Event{ID: "$newer", RoomID: e.RoomID, Type: e.Type, StateKey: e.StateKey, Sender: bob})
		time.Sleep(10 * time.Second)
		require.False(t, w.known(w.hash(e)))
	})
}

// While an event that is the room's state already is being finalised, a lookup does not take its claim back, which is in memory only. The
// next attempt does.
func TestClaimWithoutAnEvent(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		w.schedule(leave("key"), "left", time.Second)
		time.Sleep(time.Second)
		w.wantSent("left")
		delayID := w.schedule(leave("key"), "left", time.Hour)
		tm := w.find(HashToken(delayID), true)
		require.NoError(t, w.claim(t.Context(), tm, 0, Claim{Outcome: Ended, Event: SignedEvent{EventID: "$delayed1"}}))
		require.Nil(t, w.final(delayID))
		require.Error(t, w.RestartDelayed(t.Context(), delayID, alice), "it is being sent")
		require.Error(t, w.CancelDelayed(t.Context(), delayID, alice), "it is being sent")
		require.NoError(t, w.SendDelayed(t.Context(), delayID, alice))
		require.Equal(t, "$delayed1", w.final(delayID).EventID)
	})
}

// A token of a sender who has left is refused for as long as promised, even if the row cannot be deleted at first.
func TestRefusalOutlivesAFailedDelete(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", time.Hour)
		w.store.set(false, failing("drop"))
		w.DropSender(t.Context(), e.RoomID, e.Sender, time.Now().Add(time.Second))
		time.Sleep(time.Second)
		w.store.set(false, nil)
		time.Sleep(time.Minute)
		require.NoError(t, w.invariants())
		var dropped *DropError
		require.ErrorAs(t, w.End(t.Context(), w.hash(e)), &dropped)
		require.Equal(t, SenderGone, dropped.Reason)
		require.ErrorIs(t, w.End(t.Context(), w.hash(e)), ErrNotFound)
		require.True(t, w.index.Empty())
	})
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", time.Hour)
		w.DropSender(t.Context(), e.RoomID, e.Sender, time.Now().Add(time.Second))
		time.Sleep(refusedFor + time.Second)
		require.ErrorIs(t, w.End(t.Context(), w.hash(e)), ErrNotFound)
		require.True(t, w.index.Empty())
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

// With a grace period after a restart, overdue events are still closed in the order of their deadlines.
func TestOrderAfterAGracePeriod(t *testing.T) {
	inWorld(t, Config{RestartGrace: 30 * time.Second}, func(t *testing.T, w *world) {
		events := make([]Event, 20)
		for _, i := range rand.New(rand.NewPCG(1, 0)).Perm(len(events)) {
			events[i] = w.message("!room", time.Duration(10+i)*time.Second)
		}
		w.restart(time.Minute)
		time.Sleep(time.Minute)
		w.wantClosings(events...)
	})
}

// A repeated request that sends an event again, and an attempt that finds the event missing, do not overlap.
func TestSentWaitsForAnAttempt(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := requested(Event{ID: "$lost", RoomID: "!room", Type: "m.room.message", Sender: alice}, 1)
		e.Request.Signed = SignedEvent{EventID: e.ID, PDU: []byte("{}")}
		p, err := w.Begin(t.Context(), e, 10*time.Second, false)
		require.NoError(t, err)
		p.Activate(false)
		w.roomserver.set(hooks{wake: takes(5 * time.Second)}) // so the attempt is still in progress
		time.Sleep(11 * time.Second)
		begun := time.Now()
		eventID, err := w.Sent(t.Context(), RequestHash{1})
		require.NoError(t, err)
		require.Equal(t, e.ID, eventID)
		require.NotZero(t, time.Since(begun), "it waited")
		w.roomserver.set(hooks{})
		time.Sleep(time.Minute)
		w.wantClosings(e)
	})
}
