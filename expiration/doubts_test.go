package expiration

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// What the engine does not know for certain: whether a claim that failed was written, and whether a doubted event was replaced.

// After a claim failed, it may be written or not. The engine finds out before it does anything else.
func TestUnsureClaims(t *testing.T) {
	for _, written := range []bool{false, true} {
		inWorld(t, Config{}, func(t *testing.T, w *world) {
			claimed := false
			w.store.set(written, func(operation string) error {
				if claimed = claimed || operation == "claim"; claimed {
					return errFault
				}
				return nil
			})
			e := w.message("!room", 10*time.Second)
			time.Sleep(30 * time.Second)
			w.wantClosings()
			built := w.roomserver.attempts()
			w.store.set(false, nil)
			time.Sleep(time.Minute)
			w.wantClosings(e)
			if written {
				require.Equal(t, built, w.roomserver.attempts(), "a claimed event was built again")
				require.Equal(t, "$closing1", w.roomserver.closings()[0].eventID)
			}
			require.Zero(t, w.store.len())
		})
	}
}

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

// After a claim failed, the event may be claimed or not. Cancelling, restarting and sending find out.
func TestActionsAfterAClaimThatFailed(t *testing.T) {
	for _, written := range []bool{false, true} {
		for action, is := range map[string]func(Final) bool{
			"cancel": Final.Cancelled, "restart": Final.Sent, "send": Final.Sent, "list": Final.Sent,
		} {
			inWorld(t, Config{}, func(t *testing.T, w *world) {
				delayID := w.schedule(leave("key"), "left", 10*time.Second)
				w.store.set(written, failing("claim"))
				time.Sleep(10 * time.Second)
				synctest.Wait()
				w.store.set(false, nil)
				act := map[string]func(context.Context, string, string) error{
					"cancel": w.CancelDelayed, "restart": w.RestartDelayed, "send": w.SendDelayed,
				}[action]
				switch {
				case action == "list":
					require.Len(t, w.list(alice, ""), 1, "if it is claimed, it is on its way")
				case written:
					wantFinalised(t, act(t.Context(), delayID, alice), Final.Sent)
					is = Final.Sent
				default:
					require.NoError(t, act(t.Context(), delayID, alice))
				}
				time.Sleep(time.Minute)
				synctest.Wait()
				w.wantFinal(delayID, is)
				require.Len(t, w.roomserver.sent(), map[bool]int{true: 1}[w.final(delayID).Sent()])
			})
		}
	}
}
