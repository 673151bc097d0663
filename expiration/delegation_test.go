package expiration

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
)

// keptOf names the timer of an expiring event, and keptDelayed that of a delayed one.
func (w *world) keptOf(e Event) Kept { return Kept{Hash: w.hash(e)} }

func keptDelayed(delayID string) Kept { return Kept{Hash: HashToken(delayID), Delayed: true} }

// delegate delegates a timer to the participant "identity" as a member with a number, or as none with 0.
func (w *world) delegate(k Kept, member byte) Delegation {
	w.t.Helper()
	d, err := w.Find(w.t.Context(), k, "", "")
	require.NoError(w.t, err)
	d.MemberKey, d.Room, d.Identity = [32]byte{member}, "sfu room", "identity"
	require.NoError(w.t, w.Delegate(w.t.Context(), d))
	d.Taken, d.Phase = w.stored(time.Now()), DelegationWaiting
	return d
}

// wantDelegations requires that these delegations are stored.
func (w *world) wantDelegations(want ...Delegation) {
	w.t.Helper()
	synctest.Wait()
	got, err := w.Delegations(w.t.Context())
	require.NoError(w.t, err)
	require.ElementsMatch(w.t, want, got)
}

// A timer that is kept alive runs on, and ends when it is finished.
func TestKeptTimer(t *testing.T) {
	t.Run("expiring", func(t *testing.T) {
		inWorld(t, Config{TokenLimit: RateLimit{Threshold: 1, Cooloff: time.Hour}}, func(t *testing.T, w *world) {
			e := w.state("key", 10*time.Second)
			d := w.delegate(w.keptOf(e), 0)
			require.Equal(t, Delegation{
				NID: d.NID, Kept: Kept{Hash: w.hash(e)}, UserID: alice, RoomID: "!room", Duration: 10 * time.Second,
				Room: "sfu room", Identity: "identity", Taken: d.Taken, Phase: DelegationWaiting,
			}, d)
			w.wantDelegations(d)
			for range 20 {
				time.Sleep(9 * time.Second)
				require.NoError(t, w.KeepAlive(t.Context(), d.Kept))
			}
			w.wantClosings()
			known, wait := w.Allow(w.hash(e))
			require.True(t, known && wait == 0, "the client may refresh as well")
			require.NoError(t, w.Finish(t.Context(), d.Kept))
			w.wantClosings(e)
			require.Equal(t, Ended, w.roomserver.closings()[0].outcome)
			w.wantDelegations()
			require.ErrorIs(t, w.KeepAlive(t.Context(), d.Kept), ErrNotFound)
			require.ErrorIs(t, w.Finish(t.Context(), d.Kept), ErrNotFound)
		})
	})
	t.Run("delayed", func(t *testing.T) {
		inWorld(t, Config{}, func(t *testing.T, w *world) {
			delayID := w.schedule(leave("key"), "left", 10*time.Second)
			d := w.delegate(keptDelayed(delayID), 1)
			w.wantDelegations(d)
			for range 20 {
				time.Sleep(9 * time.Second)
				require.NoError(t, w.KeepAlive(t.Context(), d.Kept))
			}
			w.wantSent()
			require.NoError(t, w.Finish(t.Context(), d.Kept))
			w.wantSent("left")
			w.wantDelegations()
			require.ErrorIs(t, w.KeepAlive(t.Context(), d.Kept), ErrNotFound)
			wantFinalised(t, w.Finish(t.Context(), d.Kept), Final.Sent)
		})
	})
}

// A kind of timer is found by its own kind of token only, by its owner, in its room, and while it runs.
func TestFind(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		find := func(k Kept, owner, roomID string) error {
			_, err := w.Find(t.Context(), k, owner, roomID)
			return err
		}
		e, delayID := w.state("key", time.Minute), w.schedule(leave("other"), "left", time.Minute)
		for _, k := range []Kept{w.keptOf(e), keptDelayed(delayID)} {
			require.NoError(t, find(k, alice, "!room"))
			require.NoError(t, find(k, "", ""))
			require.ErrorIs(t, find(k, bob, "!room"), ErrNotFound)
			require.ErrorIs(t, find(k, alice, "!other"), ErrNotFound)
			require.ErrorIs(t, find(Kept{Hash: k.Hash, Delayed: !k.Delayed}, "", ""), ErrNotFound)
			w.store.set(false, failing("read"))
			require.ErrorIs(t, find(k, "", ""), errFault)
			w.store.set(false, nil)
		}

		w.roomserver.set(hooks{afterClaim: fails})
		for _, k := range []Kept{w.keptOf(e), keptDelayed(delayID)} {
			require.Error(t, w.Finish(t.Context(), k))
			require.ErrorIs(t, find(k, "", ""), ErrNotFound, "claimed")
			require.ErrorIs(t, w.Delegate(t.Context(), Delegation{Kept: k}), ErrNotFound)
		}
		w.wantDelegations()
		w.roomserver.set(hooks{})
		time.Sleep(time.Minute)
		w.wantClosings(e)
		w.wantSent("left")
	})
}

// Of a member's delegations the newest counts, and a timer has one.
func TestNewestDelegation(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		older, newer := w.schedule(leave("key"), "older", time.Hour), w.schedule(leave("key"), "newer", time.Hour)
		w.delegate(keptDelayed(older), 1)
		other := w.delegate(w.keptOf(w.message("!room", time.Hour)), 0)
		second := w.delegate(keptDelayed(newer), 1)
		w.wantDelegations(other, second)
		time.Sleep(time.Minute)
		second = w.delegate(keptDelayed(newer), 2)
		w.wantDelegations(other, second)
		require.NoError(t, w.KeepAlive(t.Context(), keptDelayed(older)), "its timer runs on")
	})
}

// What was given of the participant is stored, and what is noted later, both across a restart.
func TestNoteSession(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		d := w.delegate(w.keptOf(w.message("!room", time.Hour)), 0)
		d.Taken, d.Seen, d.RoomSID, d.Phase = d.Taken.Add(-time.Hour), d.Taken, "RM_1", DelegationConnected
		require.NoError(t, w.Delegate(t.Context(), d))
		gone := w.delegate(keptDelayed(w.schedule(leave("key"), "left", time.Hour)), 1)
		w.restart(time.Second)
		w.wantDelegations(d, gone)
		gone.Seen, gone.RoomSID, gone.Phase = d.Seen, "RM_2", DelegationGone
		notes := []SessionNote{
			{NID: gone.NID, Seen: gone.Seen, RoomSID: gone.RoomSID, Phase: gone.Phase},
			{NID: 99, Phase: DelegationGone},
		}
		w.store.set(false, failing("note sessions"))
		require.ErrorIs(t, w.NoteSession(t.Context(), notes), errFault)
		w.store.set(false, nil)
		require.NoError(t, w.NoteSession(t.Context(), notes))
		w.restart(time.Second)
		w.wantDelegations(d, gone)
	})
}

// A delegation that is not stored is an error. If memory did not know that the timer is claimed, it does now.
func TestDelegationThatIsNotStored(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		delayID := w.schedule(leave("key"), "left", time.Hour)
		d := Delegation{Kept: keptDelayed(delayID)}
		w.store.set(false, failing("delegate"))
		require.ErrorIs(t, w.Delegate(t.Context(), d), errFault)
		w.wantDelegations()
		w.store.set(true, failing("claim"))
		require.ErrorIs(t, w.SendDelayed(t.Context(), delayID, alice), errFault)
		require.ErrorIs(t, w.Delegate(t.Context(), d), ErrNotFound)
		w.store.set(false, nil)
		tm, err := w.delayedTimer(d.Hash, "")
		require.NoError(t, err)
		require.False(t, w.isRunning(tm))
		require.ErrorIs(t, w.Delegate(t.Context(), Delegation{Kept: keptDelayed("unknown")}), ErrNotFound)
		time.Sleep(time.Minute)
		w.wantSent("left")

		e := w.message("!room", time.Hour)
		time.Sleep(time.Millisecond)
		w.store.set(false, failing("drop"))
		w.DropSender(t.Context(), "!room", alice, time.Now())
		require.ErrorIs(t, w.Delegate(t.Context(), Delegation{Kept: w.keptOf(e)}), ErrNotFound, "its row is still there")
		w.store.set(false, nil)
		w.wantDelegations()
	})
}

// While a delegation is written, nothing else is written to its timer, and the caller waits for the answer. A caller that waits for the
// timer can give up.
func TestDelegateExcludesOtherWrites(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e := w.message("!room", time.Hour)
		d := Delegation{Kept: w.keptOf(e)}
		var c callers
		synctest.Wait() // the start's pruning is over
		release := w.store.hold()
		ctx, hangUp := context.WithCancel(t.Context())
		c.call(func() error { return w.Delegate(ctx, d) })
		synctest.Wait()
		second, secondHangsUp := context.WithCancel(t.Context())
		c.call(func() error { return w.Delegate(second, d) })
		c.call(func() error { w.DropEvent(t.Context(), e.ID, Redacted); return nil })
		synctest.Wait()
		require.Equal(t, 1, w.store.hanging())
		hangUp()
		c.wantWaiting(t, 3)
		secondHangsUp()
		c.wantWaiting(t, 2)
		require.ErrorIs(t, c.errs[0], batch.ErrNotAsked)
		release()
		c.wg.Wait()
		require.Equal(t, []error{nil, nil}, c.errs[1:])
		w.wantDelegations()
		w.wantNoLocks()
	})
}

// After a start the engine leaves a timer with a delegation alone for keptGrace, also if its row has no digest. Others act at once.
func TestKeptTimersWait(t *testing.T) {
	for _, digests := range []bool{true, false} {
		inWorld(t, Config{}, func(t *testing.T, w *world) {
			e, alone := w.message("!room", 10*time.Second), w.message("!room", 11*time.Second)
			delayID := w.schedule(leave("key"), "left", 10*time.Second)
			alive := w.delegate(w.keptOf(w.message("!room", 10*time.Second)), 0).Kept
			w.delegate(w.keptOf(e), 0)
			w.delegate(keptDelayed(delayID), 1)
			if !digests {
				clear(w.store.digests)
			}
			w.restart(time.Minute)
			w.wantClosings(alone)
			require.NoError(t, w.KeepAlive(t.Context(), alive))
			for range 3 {
				time.Sleep(keptGrace/3 - time.Nanosecond)
				require.NoError(t, w.KeepAlive(t.Context(), alive))
			}
			w.wantSent()
			w.wantClosings(alone)
			time.Sleep(3 * time.Nanosecond)
			w.wantSent("left")
			w.wantClosings(alone, e)
			require.NoError(t, w.Finish(t.Context(), alive))
			w.wantDelegations()
		})
	}
}

// A longer grace period holds for these timers too, and what is claimed is finished at once, in the order of the deadlines.
func TestKeptTimersAndOtherGrace(t *testing.T) {
	inWorld(t, Config{RestartGrace: time.Minute}, func(t *testing.T, w *world) {
		e := w.message("!room", 10*time.Second)
		w.delegate(w.keptOf(e), 0)
		w.restart(time.Minute)
		time.Sleep(time.Minute - time.Nanosecond)
		w.wantClosings()
		time.Sleep(time.Nanosecond)
		w.wantClosings(e)
	})
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		first, second := w.message("!room", 10*time.Second), w.message("!room", 11*time.Second)
		w.delegate(w.keptOf(first), 0)
		w.roomserver.set(hooks{afterClaim: fails})
		time.Sleep(20 * time.Second)
		synctest.Wait()
		w.roomserver.set(hooks{})
		w.restart(0)
		w.wantClosings(first, second)
	})
}

// A timer that cannot be finished now stays, with its delegation, and can be finished later. One that can never be is over.
func TestFinishFails(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		e, gone := w.message("!room", time.Hour), w.message("!gone", time.Hour)
		delayID := w.schedule(leave("key"), "left", time.Hour)
		kept := []Delegation{w.delegate(w.keptOf(e), 0), w.delegate(keptDelayed(delayID), 1), w.delegate(w.keptOf(gone), 0)}
		w.roomserver.set(hooks{beforeClaim: fails})
		for _, d := range kept {
			require.ErrorIs(t, w.Finish(t.Context(), d.Kept), errFault)
		}
		w.roomserver.set(hooks{})
		w.roomserver.refuse("left", Forbidden)
		require.ErrorAs(t, w.Finish(t.Context(), kept[1].Kept), new(*RefusedError))
		w.wantDelegations(kept...)
		w.roomserver.refuse("left", "")
		for _, d := range kept[:2] {
			require.NoError(t, w.Finish(t.Context(), d.Kept))
		}
		w.wantClosings(e)
		w.wantSent("left")

		time.Sleep(time.Millisecond)
		w.DropSender(t.Context(), "!gone", alice, time.Now())
		w.wantDelegations()
		require.ErrorIs(t, w.KeepAlive(t.Context(), kept[2].Kept), ErrNotFound)
		require.ErrorAs(t, w.Finish(t.Context(), kept[2].Kept), new(*DropError))
		require.ErrorIs(t, w.Finish(t.Context(), kept[2].Kept), ErrNotFound)
	})
}

// An older delayed event is cancelled if the newer one is of the same sender and for the same state. Others are left alone.
func TestSupersede(t *testing.T) {
	inWorld(t, Config{}, func(t *testing.T, w *world) {
		older, newer, other := w.schedule(leave("key"), "older", time.Hour), w.schedule(leave("key"), "newer", time.Hour), w.schedule(leave("other"), "other", time.Hour)
		bobs := leave("key")
		bobs.Sender = "@bob:example.org"
		ofBob := w.schedule(bobs, "bob's", time.Hour)
		e := w.message("!room", 2*time.Hour)
		for _, pair := range [][2]Kept{
			{keptDelayed(older), keptDelayed(other)}, {keptDelayed(older), keptDelayed(ofBob)}, {keptDelayed(older), keptDelayed(older)},
			{keptDelayed(older), w.keptOf(e)}, {w.keptOf(e), keptDelayed(newer)}, {keptDelayed("unknown"), keptDelayed(newer)},
			{keptDelayed(older), keptDelayed("unknown")},
		} {
			require.NoError(t, w.Supersede(t.Context(), pair[0], pair[1]))
		}
		require.NoError(t, w.Supersede(t.Context(), keptDelayed(older), keptDelayed(newer)))
		require.NoError(t, w.Supersede(t.Context(), keptDelayed(older), keptDelayed(newer)), "again")
		time.Sleep(90 * time.Minute)
		sent := map[string]bool{}
		for _, e := range w.roomserver.sent() {
			sent[e.content] = true
		}
		require.Equal(t, map[string]bool{"newer": true, "other": true, "bob's": true}, sent)
		require.NoError(t, w.Supersede(t.Context(), keptDelayed(newer), keptDelayed(other)), "it is over")
		w.wantClosings()
	})
}
