package expiration

import (
	"cmp"
	"context"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/batch"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/index"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/expiration/internal/lanes"
	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
)

// loadAll reads an earlier process's timers into memory, and returns those that need further work.
func (t *Timers) loadAll(ctx context.Context) (u inherited, err error) {
	// While a million timers are loaded, the heap only grows. By default the collector would go through all of it about ten times.
	usual := debug.SetGCPercent(loadingGCPercent)
	u, err = t.loadTimers(ctx)
	debug.SetGCPercent(usual)
	if err != nil {
		return u, err
	}
	return u, t.readSenders(ctx)
}

// loadTimers loads all timers. It reads the whole row if the timer is claimed, if its digest is under another key, or if it has no digest,
// which StateComes removes.
func (t *Timers) loadTimers(ctx context.Context) (u inherited, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now, key := t.clock.now(), t.tokens.names.id()
	t.forgotAt = now
	var whole []int64
	doubted, kept := map[int64]bool{}, map[int64]bool{}
	if err = t.store.Index(ctx, func(row Indexed) error {
		if row.Claimed || row.Digest.get(digestKey) != key {
			whole = append(whole, row.NID)
			if row.Digest == (Digest{}) {
				doubted[row.NID] = true
			}
			if row.Kept {
				kept[row.NID] = true
			}
			return nil
		}
		t.loadTimerWithMu(row, now)
		return nil
	}); err != nil {
		return u, err
	}
	for nids := range slices.Chunk(whole, batch.Max) {
		rows, err := t.store.Read(ctx, nids)
		if err != nil {
			return u, err
		}
		for _, row := range rows {
			if row == nil {
				continue
			}
			indexed := newIndexed(*row, t.tokens.Digest(*row))
			indexed.Kept = kept[row.NID]
			tm := t.loadTimerWithMu(indexed, now)
			switch {
			case row.Claim == nil:
				if row.Delayed == nil && row.Event.StateKey != nil && doubted[row.NID] {
					u.doubted = append(u.doubted, tm)
				}
				continue
			case row.Delayed != nil:
				t.inFlight[row.Claim.Event.EventID] = inFlight{tm, row.Event.Sender, row.Event.ID}
			}
			u.claimed = append(u.claimed, tm)
		}
	}
	return u, t.index.Link()
}

// loadTimerWithMu loads one timer of an earlier process.
func (t *Timers) loadTimerWithMu(row Indexed, now time.Duration) *index.Timer {
	due := t.clock.moment(row.Deadline)
	overdue := due <= now
	grace := t.cfg.RestartGrace
	if row.Digest.kind() != index.Expiring {
		grace = min(grace, maxDelayedGrace)
	}
	if row.Kept && !row.Claimed { // a claimed event is sent, whatever the SFU says
		grace = max(grace, keptGrace)
	}
	if grace > 0 {
		due = max(due, now+grace)
	}
	tm := t.index.Load(row.row(), due)
	// We do not know yet whether an overdue event reached its room, so it does not count against its sender's limit. If the event is there,
	// it is soon closed or refreshed.
	if overdue && !tm.Delayed() {
		tm.Presence = index.Unsent
	}
	return tm
}

// finishClaimed finishes what an earlier process claimed, and the overdue timers that come before that in the same room. A room's timers
// are attempted in the order of their deadlines; several rooms are handled concurrently. A failed attempt is retried like any other.
func (t *Timers) finishClaimed(claimed []*index.Timer) {
	ctx, cancel := context.WithTimeout(t.ctx, recoverTimeout)
	defer cancel()
	rooms := map[uint64][]*index.Timer{}
	var order []uint64
	for _, tm := range t.withEarlier(claimed) {
		if _, ok := rooms[tm.Room()]; !ok {
			order = append(order, tm.Room())
		}
		rooms[tm.Room()] = append(rooms[tm.Room()], tm)
	}
	var done sync.WaitGroup
	free := make(chan struct{}, lanes.Places)
	for _, room := range order {
		free <- struct{}{}
		done.Go(func() {
			defer func() { <-free }()
			for _, tm := range rooms[room] {
				if !guard.Run("finishing what was claimed", func() {
					defer t.removeRow(ctx, tm)
					_ = t.close(ctx, tm, Expired, nil)
				}) {
					t.scheduleRetry(tm)
				}
				t.returned(tm)
			}
		})
	}
	done.Wait()
}

// withEarlier returns the claimed timers, and those of the same rooms that are unclaimed and due before them, because an attempt had
// failed. All are sorted by deadline, and handed over from the scheduler to the caller.
func (t *Timers) withEarlier(claimed []*index.Timer) (all []*index.Timer) {
	if len(claimed) == 0 {
		return nil
	}
	now, last := t.clock.now(), map[uint64]time.Duration{}
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, tm := range claimed {
		all = append(all, tm)
		if before, ok := last[tm.Room()]; !ok || tm.Due > before {
			last[tm.Room()] = tm.Due
		}
	}
	t.index.Live(func(tm *index.Timer) {
		if before, ok := last[tm.Room()]; ok && tm.Running() && tm.Due <= now && tm.Due < before {
			all = append(all, tm)
		}
	})
	slices.SortFunc(all, func(a, b *index.Timer) int {
		return cmp.Or(cmp.Compare(a.Due, b.Due), cmp.Compare(a.Deadline, b.Deadline))
	})
	for _, tm := range all {
		t.index.HandOver(tm)
	}
	return all
}
