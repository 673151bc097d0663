package index

import (
	"errors"
	"fmt"
)

// Invariants returns the violated invariants, or nil. It checks everything, and is for tests.
func (x *Index) Invariants() error {
	var wrong []error
	check := func(ok bool, tm *Timer, what string) {
		if !ok {
			wrong = append(wrong, fmt.Errorf("%s: %s", tm, what))
		}
	}
	expiring, delayed, states, tokens, scheduled := 0, 0, 0, 0, 0
	for tm := range x.all() {
		found := map[*Timer]bool{}
		x.OfState(tm.state, func(other *Timer) { found[other] = true })
		check(found[tm] == (tm.Live() && tm.state != 0), tm, "the list of its state disagrees with its phase")
		clear(found)
		x.OfSender(tm.sender, tm.kind, func(other *Timer) { found[other] = true })
		check(found[tm] == tm.Live(), tm, "the list of its sender disagrees with its phase")
		check(!tm.Live() || x.byToken[tokenKey(tm.token)] == tm, tm, "not found by its token")
		check(tm.nid <= x.lastNID, tm, "wrong NID")
		_, refused := x.refused[tm]
		check(tm.phase != Gone || refused, tm, "gone, and still in the index")
		check(!refused || !tm.Live(), tm, "live, and its token refused")
		check(tm.phase != Pending || tm.place < 0, tm, "pending, and scheduled")
		check(tm.phase != Running && tm.phase != Claimed || tm.place >= 0 || tm.attempts > 0, tm, "neither scheduled nor attempted")
		check(!refused || tm.place >= 0 || tm.attempts > 0, tm, "refused, and neither scheduled nor attempted")
		check(!tm.Has(Superseded) || tm.Has(MaybeReplaced), tm, "superseded, and not maybe replaced")
		check(tm.place < 0 || x.wakes[tm.place] == tm, tm, "wrong place in the heap")
		_, left := x.left[tm]
		check(left == tm.IsLeft(), tm, "left disagrees with its phase")
		if tm.place >= 0 {
			scheduled++
		}
		if x.byToken[tokenKey(tm.token)] == tm {
			tokens++
		}
		switch {
		case !tm.Live():
			continue
		case tm.Delayed():
			delayed++
		default:
			expiring++
		}
		if tm.state != 0 {
			states++
		}
	}
	for _, tm := range x.byRequest {
		check(tm.Live(), tm, "ended, and found by its request")
	}
	senders := x.bySender[Expiring].len() + x.bySender[Delayed].len() + x.bySender[ServiceDelayed].len()
	if expiring != x.expiring || delayed != x.delayed || scheduled != len(x.wakes) ||
		tokens != len(x.byToken) || states != x.byState.len() || expiring+delayed != senders {
		wrong = append(wrong, fmt.Errorf("the counts are off by: %d expiring, %d delayed, %d scheduled, %d tokens, %d states, %d senders",
			expiring-x.expiring, delayed-x.delayed, scheduled-len(x.wakes), tokens-len(x.byToken), states-x.byState.len(), expiring+delayed-senders))
	}
	return errors.Join(wrong...)
}

// len returns the number of timers in all lists, or -1 if a list is counted wrongly.
func (l lists) len() (all int) {
	for key := range l.first {
		n := 0
		l.each(key, func(*Timer) { n++ })
		if l.count != nil && l.count[key] != n {
			return -1
		}
		all += n
	}
	if l.count != nil && len(l.count) != len(l.first) {
		return -1
	}
	return all
}

// all returns the timers that anything leads to.
func (x *Index) all() map[*Timer]bool {
	all := map[*Timer]bool{}
	add := func(tm *Timer) { all[tm] = true }
	x.Live(add)
	for state := range x.byState.first {
		x.OfState(state, add)
	}
	for _, tm := range x.byRequest {
		add(tm)
	}
	for _, tm := range x.byToken {
		add(tm)
	}
	for _, tm := range x.wakes {
		add(tm)
	}
	for tm := range x.left {
		add(tm)
	}
	for tm := range x.refused {
		add(tm)
	}
	return all
}
