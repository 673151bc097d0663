package expiration

import (
	"maps"
	"time"
)

// pruneInterval is how often finalised events that are older than Config.KeepFinalised are deleted, and users forgotten who have none left.
const pruneInterval = time.Hour

// prune deletes old finalised events, at the start and at each pruneInterval.
func (t *Timers) prune() {
	ticker := time.NewTicker(pruneInterval)
	defer ticker.Stop()
	for {
		t.mu.Lock()
		maps.DeleteFunc(t.due, func(_ uint64, full Bucket) bool { return time.Duration(full) <= t.clock.now() })
		t.mu.Unlock()
		err := t.store.Prune(t.ctx, t.clock.stored(t.clock.now()).Add(-t.cfg.KeepFinalised))
		if err == nil {
			err = t.readSenders(t.ctx)
		}
		if err != nil && t.ctx.Err() == nil {
			t.metrics.errors.WithLabelValues("prune").Inc()
			t.log.WithError(err).Error("Failed to delete old finalised events")
		}
		select {
		case <-t.ctx.Done():
			return
		case <-ticker.C:
		}
	}
}
