package expiration

import (
	"context"
	"errors"
	"sync"
	"time"
)

const (
	// maxBatch is how many refreshes are committed at once, at the most.
	maxBatch = 512
	// commitTimeout is how long one commit may take before all who wait for it are told of a fault.
	commitTimeout = 30 * time.Second
)

// Refresh is the new deadline of a running timer.
type Refresh struct {
	NID      int64 // of the timer
	Duration time.Duration
	Deadline time.Time
}

// groupCommit writes refreshes together: while one batch is being committed, the next one gathers. Who comes when nothing
// is being committed waits for nobody. Each caller has his answer when his own batch is committed, or has failed.
type groupCommit struct {
	store Store
	// turn is full while somebody commits.
	turn chan struct{}

	mu   sync.Mutex // guards next, and the batch in it; a leaf, see the lock order in doc.go
	next *batch     // the one that gathers, or nil
}

// batch is what is committed at once.
type batch struct {
	refreshes []Refresh
	done      chan struct{} // closed when it is decided
	// found holds for each refresh whether there was such a timer, if err is nil, once done is closed.
	found []bool
	err   error
}

func newGroupCommit(store Store) *groupCommit {
	return &groupCommit{store: store, turn: make(chan struct{}, 1)}
}

// refresh returns when the new deadline is committed, and reports whether there was such a timer. It does not return before
// it is decided, not even if the caller hangs up: what may still be written must not be overtaken by the next refresh of the
// same timer.
func (g *groupCommit) refresh(ctx context.Context, r Refresh) (bool, error) {
	g.mu.Lock()
	b := g.next
	first := b == nil || len(b.refreshes) == maxBatch
	if first {
		b = &batch{done: make(chan struct{})}
		g.next = b
	}
	place := len(b.refreshes)
	b.refreshes = append(b.refreshes, r)
	g.mu.Unlock()

	if first { // and so the one who commits for all
		g.commit(context.WithoutCancel(ctx), b)
	}
	<-b.done
	if b.err != nil {
		return false, b.err
	}
	return b.found[place], nil
}

// commit waits for its turn, ends the gathering of a batch and writes it.
func (g *groupCommit) commit(ctx context.Context, b *batch) {
	g.turn <- struct{}{}
	defer func() { <-g.turn }()
	b.err = errNotCommitted
	defer close(b.done)
	g.mu.Lock()
	if g.next == b {
		g.next = nil
	}
	g.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, commitTimeout)
	defer cancel()
	b.found, b.err = g.store.Refresh(ctx, b.refreshes)
}

// errNotCommitted is what those who wait are told if the one who commits for them panics.
var errNotCommitted = errors.New("the commit did not come to its end")
