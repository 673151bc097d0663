package keeper

import (
	"errors"
	"fmt"
)

// invariants returns the violated invariants of all that is in memory, or nil.
func (k *Keeper) invariants() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	var wrong []error
	must := func(ok bool, d *delegation, what string) {
		if !ok {
			wrong = append(wrong, fmt.Errorf("timer %d, %s: %s", d.row.NID, d.phase, what))
		}
	}
	members := 0
	for nid, d := range k.kept {
		_, inCall := d.call.delegations[d]
		_, at := d.next()
		must(nid == d.row.NID && d.phase < over, d, "in memory, and over")
		must(inCall && k.calls[d.row.Room] == d.call, d, "not in its call")
		if d.row.MemberKey != [32]byte{} {
			members++
			must(k.ofMember[d.row.MemberKey] == d, d, "not the one of its member")
		}
		must(d.phase == gone || !d.lookAt.IsZero(), d, "no look is planned")
		must(d.phase != gone || d.lookAt.IsZero() && !at.IsZero(), d, "nothing more is planned")
		must(d.phase != gone || d.due[keep].IsZero() && d.due[check].IsZero(), d, "gone, and to be restarted")
		must(d.phase == gone || d.due[finish].IsZero(), d, "to be ended, and not gone")
		must(d.due[note].IsZero() || d.due[finish].IsZero(), d, "to be ended before it is noted")
		must(d.phase != missing || !d.until.Before(d.since.Add(confirmed)) && !d.until.After(d.since.Add(grace)), d, "missing for too short or too long")
		must(d.phase != connected || d.sid != "" || d.row.RoomSID == "", d, "connected to no room")
		must(d.task.running || at.IsZero() == (d.task.queue == nil), d, "planned, and in no queue")
		must(d.task.running || at.Equal(d.task.at), d, "planned for another time")
		must(d.task.running || d.task.queue == nil || (d.phase == gone) == (d.task.queue == &k.finishes), d, "in the wrong queue")
	}
	if members != len(k.ofMember) {
		wrong = append(wrong, fmt.Errorf("%d members, %d delegations of members", len(k.ofMember), members))
	}
	all := 0
	for name, c := range k.calls {
		all += len(c.delegations)
		if len(c.delegations) == 0 || c.name != name || !c.task.running && c.next().IsZero() != (c.task.queue == nil) {
			wrong = append(wrong, fmt.Errorf("call %s is empty, or not planned rightly", name))
		}
	}
	if all != len(k.kept) {
		wrong = append(wrong, fmt.Errorf("%d delegations, and %d in calls", len(k.kept), all))
	}
	for i, q := range []*queue{&k.looks, &k.keeps, &k.finishes} {
		if places := []int{lookPlaces, keepPlaces, finishPlaces}[i]; q.free < 0 || q.free > places {
			wrong = append(wrong, fmt.Errorf("%d places of %d are free", q.free, places))
		}
		for place, t := range q.tasks {
			if t.place != place || t.queue != q || t.running || t.at.IsZero() {
				wrong = append(wrong, errors.New("a task is in the wrong place"))
			}
		}
	}
	if k.finishes.free == finishPlaces && len(k.finishing) > 0 {
		wrong = append(wrong, errors.New("a user has a place too many"))
	}
	return errors.Join(wrong...)
}
