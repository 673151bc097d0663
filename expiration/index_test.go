package expiration

import (
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// empty reports whether the index has nothing, and nothing is lost in it.
func (x *index) empty() bool {
	return x.count+x.byToken.used+x.byState.used+x.bySender.used+x.byRequest.used+len(x.left)+x.wakes.Len() == 0 &&
		len(x.timers.free) == int(x.timers.last)
}

// A table finds what a map finds, whatever was put in and taken out, also where many keys have the same home.
func TestTable(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		keys := []uint64{0} // by slot
		x, want := newTable(func(s slot) uint64 { return keys[s] }), map[uint64]slot{}
		for range rapid.IntRange(1, 200).Draw(t, "steps") {
			key := rapid.Uint64Range(0, 40).Draw(t, "key") << rapid.SampledFrom([]int{0, 20}).Draw(t, "home")
			if rapid.Bool().Draw(t, "set") {
				keys = append(keys, key)
				s := slot(len(keys) - 1)
				x.set(key, s)
				want[key] = s
			} else {
				x.remove(key, slot(len(keys))) // another's
				if s, ok := want[key]; ok {
					x.remove(key, s)
					delete(want, key)
				}
			}
			for key, s := range want {
				if x.get(key) != s {
					t.Fatalf("%d is not found", key)
				}
			}
			if x.used != len(want) {
				t.Fatalf("%d entries instead of %d", x.used, len(want))
			}
		}
	})
}

// The index finds each timer by all that it has, and no other, while they come and go.
func TestIndex(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		x, tokens := newIndex(), &Tokens{}
		rows, refs := []Timer{}, []ref{}
		answered := map[RequestHash]string{}
		row := func() (Indexed, time.Duration) {
			draw := func(what string) string { return rapid.SampledFrom([]string{"a", "b", "c"}).Draw(t, what) }
			nid := x.lastNID + 1
			e := Event{ID: string(rune('A' + nid)), RoomID: draw("room"), Sender: draw("sender")}
			if key := draw("key"); key != "c" {
				e.StateKey = &key
			}
			if rapid.Bool().Draw(t, "with a transaction ID") {
				e.Request = &Request{Hash: RequestHash{byte(nid)}}
			}
			row := Timer{NID: nid, Event: e, TokenHash: HashToken(tokens.Token(e.ID)), Received: time.UnixMilli(0), Deadline: time.UnixMilli(0)}
			rows = append(rows, row)
			return newIndexed(row, names{}.digest(row)), time.Duration(rapid.IntRange(0, 99).Draw(t, "due"))
		}
		for range rapid.IntRange(0, 60).Draw(t, "at the start") {
			refs = append(refs, x.put(row()))
		}
		x.link()
		repeatable := slices.Clone(rows) // the requests of an earlier process
		checkIndex(t, x, rows, refs)
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			if len(rows) == 0 || rapid.Bool().Draw(t, "add") {
				row, due := row()
				r := x.add(row, due)
				x.schedule(r, due)
				refs = append(refs, r)
				if rapid.Bool().Draw(t, "failed") {
					x.addToRequests(r.slot, x.at(r))
					repeatable = append(repeatable, rows[len(rows)-1])
				}
			} else {
				i := rapid.IntRange(0, len(rows)-1).Draw(t, "remove")
				if rapid.Bool().Draw(t, "closed") {
					x.answer(refs[i], rows[i].Event.ID)
					if rows[i].Event.Request != nil && slices.ContainsFunc(repeatable, sameEvent(rows[i])) {
						answered[rows[i].Event.Request.Hash] = rows[i].Event.ID
					}
				}
				x.remove(refs[i])
				x.remove(refs[i])
				x.forgetRow(refs[i])
				if x.at(refs[i]) != nil {
					t.Fatal("a timer that was removed is found")
				}
				rows, refs = slices.Delete(rows, i, i+1), slices.Delete(refs, i, i+1)
			}
			checkIndex(t, x, rows, refs)
			checkRequests(t, x, rows, refs, repeatable, answered)
		}
		for _, r := range refs {
			x.remove(r)
			x.forgetRow(r)
		}
		if !x.empty() {
			t.Fatal("not empty")
		}
	})
}

func checkIndex(t *rapid.T, x *index, rows []Timer, refs []ref) {
	states, senders, rooms := map[uint64]int{}, map[uint64]int{}, map[uint64]int{}
	for i, row := range rows {
		if x.token(row.TokenHash, false) != refs[i] || x.at(refs[i]) == nil {
			t.Fatalf("%s is not found", row.Event.ID)
		}
		nearly := row.TokenHash
		nearly[tokenPrefix-1]++
		if x.token(nearly, false) != (ref{}) || x.token(row.TokenHash, true) != (ref{}) {
			t.Fatalf("%s is found by something else", row.Event.ID)
		}
		if s, ok := row.Event.State(); ok {
			states[names{}.state(s)]++
		}
		senders[names{}.hash(row.Event.Sender)]++
		rooms[names{}.hash(row.Event.RoomID)]++
	}
	for state, n := range states {
		x.ofState(state, func(_ ref, tm *timer) { n--; requireSame(t, tm.state, state) })
		requireSame(t, n, 0)
	}
	for sender, n := range senders {
		x.ofSender(sender, func(_ ref, tm *timer) { n--; requireSame(t, tm.sender, sender) })
		requireSame(t, n, 0)
	}
	for room, n := range rooms {
		requireSame(t, len(x.inRoom(room)), n)
	}
	requireSame(t, x.count, len(rows))
	requireSame(t, x.wakes.Len(), len(rows))
	for i := range rows {
		if tm := x.at(refs[i]); tm.place < 0 || x.wakes.slots[tm.place] != refs[i].slot || tm.wake != tm.due {
			t.Fatalf("%s is not scheduled for when it is due", rows[i].Event.ID)
		}
		if x.wakes.at(0).wake > x.at(refs[i]).wake {
			t.Fatal("the first wake is not in front")
		}
	}
}

func sameEvent(row Timer) func(Timer) bool {
	return func(other Timer) bool { return other.Event.ID == row.Event.ID }
}

// checkRequests checks that those requests are known that may be repeated, and what came of them.
func checkRequests(t *rapid.T, x *index, rows []Timer, refs []ref, repeatable []Timer, answered map[RequestHash]string) {
	for i, row := range rows {
		if row.Event.Request == nil {
			continue
		}
		want := ref{}
		if slices.ContainsFunc(repeatable, sameEvent(row)) {
			want = refs[i]
		}
		r, eventID := x.ofRequest(names{}.request(row.Event.Request.Hash))
		requireSame(t, r, want)
		requireSame(t, eventID, "")
	}
	for request, want := range answered {
		r, eventID := x.ofRequest(names{}.request(request))
		requireSame(t, r, ref{})
		requireSame(t, eventID, want)
	}
	requireSame(t, len(x.answered), len(answered))
}

func requireSame[T comparable](t *rapid.T, got, want T) {
	t.Helper()
	if got != want {
		t.Fatalf("%v instead of %v", got, want)
	}
}
