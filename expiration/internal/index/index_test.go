package index

import (
	"fmt"
	"runtime"
	"slices"
	"testing"
	"time"
	"unsafe"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func token(nid int64) [TokenSize]byte {
	return [TokenSize]byte{0: byte(nid), TokenSize - 1: byte(nid >> 8)}
}

// drawRow returns a row that shares some of its names with others.
func drawRow(t *rapid.T, x *Index) Row {
	draw := func(what string, least uint64) uint64 { return rapid.Uint64Range(least, 3).Draw(t, what) }
	nid := x.NextNID()
	row := Row{
		NID: nid, Token: token(nid), Room: draw("room", 1), Sender: draw("sender", 1), State: draw("state", 0),
		Kind: rapid.SampledFrom([]Kind{Expiring, Delayed, ServiceDelayed}).Draw(t, "kind"),
	}
	if rapid.Bool().Draw(t, "with a transaction ID") {
		row.Request = 1000 + uint64(nid)
	}
	return row
}

// Whatever happens to timers, in any order, each is found by all its names while it is live. Its phase only makes the transitions of the
// table in the package comment.
func TestIndex(t *testing.T) {
	ways := map[Phase][]Phase{
		Pending: {Running, Claimed, Stopped}, Running: {Claimed, Stopped}, Claimed: {Running, Finished}, Stopped: {Gone}, Finished: {Gone},
	}
	rapid.Check(t, func(t *rapid.T) {
		x := New()
		var all []*Timer
		live := map[*Timer]bool{}
		for range rapid.IntRange(0, 20).Draw(t, "at the start") {
			row := drawRow(t, x)
			row.Claimed = rapid.Bool().Draw(t, "claimed")
			tm := x.Load(row, time.Duration(rapid.IntRange(0, 99).Draw(t, "due")))
			all, live[tm] = append(all, tm), true
		}
		if err := x.Link(); err != nil {
			t.Fatal(err)
		}
		for tm := range live {
			if tm.Phase() == Claimed {
				x.HandOver(tm)
			}
		}
		for range rapid.IntRange(1, 80).Draw(t, "steps") {
			if len(all) == 0 || rapid.IntRange(0, 3).Draw(t, "add") == 0 {
				tm := x.Add(drawRow(t, x), time.Duration(rapid.IntRange(0, 99).Draw(t, "due")))
				all, live[tm] = append(all, tm), true
				continue
			}
			tm := all[rapid.IntRange(0, len(all)-1).Draw(t, "which")]
			before, changed := tm.Phase(), false
			wake := time.Duration(rapid.IntRange(0, 99).Draw(t, "wake"))
			switch do := rapid.SampledFrom([]string{
				"activate", "claim", "unclaim", "stop", "forget", "refuse", "forget token", "schedule", "attempt", "repeatable", "doubt", "settle",
			}).Draw(t, "do"); do {
			case "activate":
				changed = x.Activate(tm, wake)
			case "claim":
				if changed = x.Claim(tm); changed && before == Pending {
					x.Schedule(tm, wake) // as the attempt does
				}
			case "unclaim":
				changed = x.Unclaim(tm)
			case "stop":
				if changed = x.Stop(tm); changed {
					delete(live, tm)
				}
			case "forget":
				changed = x.Forget(tm)
			case "refuse":
				x.Refuse(tm, wake)
			case "forget token":
				x.ForgetToken(tm)
			case "schedule":
				x.Schedule(tm, wake)
			case "attempt":
				if x.Schedule(tm, wake) {
					x.HandOver(tm)
					x.Schedule(tm, wake)
					x.Returned(tm)
				}
			case "repeatable":
				x.Repeatable(tm)
			case "doubt":
				tm.Doubt(rapid.SampledFrom([]Doubts{RowUnsure, MaybeReplaced, Superseded}).Draw(t, "doubt"))
			case "settle":
				tm.Resolve(rapid.SampledFrom([]Doubts{RowUnsure, MaybeReplaced, Superseded}).Draw(t, "doubt"))
			}
			if changed != (tm.Phase() != before) || changed && !slices.Contains(ways[before], tm.Phase()) {
				t.Fatalf("from %s to %s, and the method returned %t", before, tm.Phase(), changed)
			}
			if err := x.Invariants(); err != nil {
				t.Fatal(err)
			}
			checkFound(t, x, live)
		}
	})
}

// checkFound requires that exactly the live timers are found, each by all its names.
func checkFound(t *rapid.T, x *Index, live map[*Timer]bool) {
	expiring, delayed := x.Len()
	if expiring+delayed != len(live) {
		t.Fatalf("%d timers, want %d", expiring+delayed, len(live))
	}
	for tm := range live {
		if x.ByToken(tm.Token(), tm.Delayed()) != tm || x.ByToken(tm.Token(), !tm.Delayed()) != nil {
			t.Fatalf("%s is not found by its token, or as the other kind", tm)
		}
		if !slices.Contains(x.InRoom(tm.Room()), tm) {
			t.Fatalf("%s is not found in its room", tm)
		}
		for name, by := range map[string]func(func(*Timer)){
			"sender": func(f func(*Timer)) { x.OfSender(tm.Sender(), tm.kind, f) },
			"state":  func(f func(*Timer)) { x.OfState(tm.State(), f) },
		} {
			found := name == "state" && tm.State() == 0
			by(func(other *Timer) {
				found = found || other == tm
				if !live[other] || name == "sender" && (other.Sender() != tm.Sender() || other.kind != tm.kind) ||
					name == "state" && other.State() != tm.State() {
					t.Fatalf("%s is found by the %s of %s", other, name, tm)
				}
			})
			if !found {
				t.Fatalf("%s is not found by its %s", tm, name)
			}
		}
	}
	if first := x.First(); first != nil {
		wake, _ := first.Wake()
		for tm := range live {
			if its, scheduled := tm.Wake(); scheduled && its < wake {
				t.Fatalf("%s is not first; %s is", tm, first)
			}
		}
	}
}

// A repeatable request finds its timer and, for a while after that has ended, its event.
func TestRequests(t *testing.T) {
	x := New()
	old := x.Load(Row{NID: 1, Token: token(1), Request: 1}, 0)
	sent := x.Add(Row{NID: 2, Token: token(2), Request: 2}, 0)
	require.NoError(t, x.Link())
	failed := x.Add(Row{NID: 3, Token: token(3), Request: 3}, 0)
	none := x.Add(Row{NID: 4, Token: token(4)}, 0)
	x.Repeatable(failed)
	x.Repeatable(none)
	want := func(request uint64, timer *Timer, event string) {
		t.Helper()
		tm, eventID := x.OfRequest(request)
		require.Equal(t, timer, tm)
		require.Equal(t, event, eventID)
	}
	want(1, old, "")
	want(2, nil, "")
	want(3, failed, "")
	want(0, nil, "")
	x.RememberRequest(old, "$old")
	x.RememberRequest(sent, "$sent")
	x.Stop(old)
	x.Stop(sent)
	x.Stop(failed)
	want(1, nil, "$old")
	want(2, nil, "")
	want(3, nil, "")
	x.ForgetRequests()
	want(1, nil, "$old")
	x.ForgetRequests()
	want(1, nil, "")
	x.Repeatable(old)
	want(1, nil, "")
}

// A refused token is found after its timer has ended, until ForgetToken is called.
func TestRefusedTokens(t *testing.T) {
	for _, tokenFirst := range []bool{true, false} {
		x := New()
		tm := x.Load(Row{NID: 1, Token: token(1)}, 5)
		require.NoError(t, x.Link())
		require.False(t, x.Refuse(tm, 9), "the timer is live")
		require.False(t, x.ForgetToken(tm))
		require.True(t, x.Stop(tm))
		require.Nil(t, x.ByToken(token(1), false))
		require.True(t, x.Refuse(tm, 9))
		require.Same(t, tm, x.ByToken(token(1), false))
		require.Same(t, tm, x.First())
		steps := []func(*Timer) bool{x.ForgetToken, x.Forget}
		if !tokenFirst {
			slices.Reverse(steps)
		}
		for _, step := range steps {
			require.True(t, step(tm))
			require.False(t, step(tm))
			require.NoError(t, x.Invariants())
		}
		require.False(t, x.Refuse(tm, 9), "the timer is gone")
		require.Nil(t, x.ByToken(token(1), false))
		require.Nil(t, x.First())
		require.True(t, x.Empty())
	}
}

// BenchmarkMemory prints how much memory a running timer takes, including the index.
func BenchmarkMemory(b *testing.B) {
	const timers = 1_000_000
	for b.Loop() {
		x := New()
		var before, after uint64 = heapInUse(), 0
		for i := range int64(timers) {
			n := uint64(i)*0x9e3779b97f4a7c15 | 1
			x.Load(Row{
				NID: i + 1, Token: [TokenSize]byte([]byte(fmt.Sprintf("%016x", n))), Room: n % 1000, Sender: n, State: n,
			}, time.Duration(n%1000))
		}
		require.NoError(b, x.Link())
		after = heapInUse()
		b.ReportMetric(float64(after-before)/timers, "B/timer")
		b.ReportMetric(float64(unsafe.Sizeof(Timer{})), "B/struct")
		if x.NextNID() == 0 {
			b.Fatal("kept alive")
		}
	}
}

// heapInUse returns how much memory is in use after a garbage collection.
func heapInUse() uint64 {
	var stats runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&stats)
	return stats.HeapAlloc
}

// A timer is removed without a walk through the others of its state and sender: that holds a lock for which every request waits.
func TestStopDoesNotSearch(t *testing.T) {
	x := New()
	first := x.Add(Row{NID: 1, Token: token(1), Sender: 1, State: 1}, 0)
	second := x.Add(Row{NID: 2, Token: token(2), Sender: 1, State: 1}, 0)
	third := x.Add(Row{NID: 3, Token: token(3), Sender: 1, State: 1}, 0)
	x.Add(Row{NID: 4, Token: token(4), Sender: 1, State: 1}, 0)
	third.ofState.next, third.ofSender.next = nil, nil // who walks does not come to the first
	x.Stop(second)
	require.Equal(t, links{previous: third}, first.ofState)
	require.Equal(t, links{previous: third}, first.ofSender)
	scheduled := x.Add(Row{NID: 5, Token: token(5), Sender: 1, Kind: Delayed}, 0)
	require.Equal(t, 1, x.Count(1, Delayed))
	require.Zero(t, x.Count(1, ServiceDelayed))
	x.Stop(scheduled)
	require.Zero(t, x.Count(1, Delayed))
	require.Empty(t, x.bySender[Delayed].count)
}
