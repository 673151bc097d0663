package expiration

import (
	"context"
	"errors"
	"sync"
	"time"
)

const (
	// maxBatch is how many writes are committed at once, at the most.
	maxBatch = 512
	// commitTimeout is how long one commit may take before all who wait for it are told of a fault.
	commitTimeout = 30 * time.Second
)

// groupCommit commits writes of one kind together: while one batch is being committed, the next one gathers. Who comes when
// nothing is being committed waits for nobody. Each caller has his answer when his own batch is committed, or has failed.
type groupCommit[W any] struct {
	// commit writes a batch, and reports for each write whether its timer was as it must be.
	commit func(context.Context, []W) ([]bool, error)
	// turn is full while somebody commits.
	turn chan struct{}

	mu   sync.Mutex // guards next, and the writes in it; a leaf, see the lock order in doc.go
	next *batch[W]  // the one that gathers, or nil
}

// batch is what is committed at once.
type batch[W any] struct {
	writes []W
	done   chan struct{} // closed when it is decided
	// found is what commit has reported, if err is nil, once done is closed.
	found []bool
	err   error
}

func newGroupCommit[W any](commit func(context.Context, []W) ([]bool, error)) *groupCommit[W] {
	return &groupCommit[W]{commit: commit, turn: make(chan struct{}, 1)}
}

// write returns when the write is committed, and reports whether its timer was as it must be. It does not return before it is
// decided, not even if the caller hangs up: what may still be written must not be overtaken by the next write to the same
// timer.
func (g *groupCommit[W]) write(ctx context.Context, w W) (bool, error) {
	g.mu.Lock()
	b := g.next
	first := b == nil || len(b.writes) == maxBatch
	if first {
		b = &batch[W]{done: make(chan struct{})}
		g.next = b
	}
	place := len(b.writes)
	b.writes = append(b.writes, w)
	g.mu.Unlock()

	if first { // and so the one who commits for all
		g.lead(context.WithoutCancel(ctx), b)
	}
	<-b.done
	if b.err != nil {
		return false, b.err
	}
	return b.found[place], nil
}

// lead waits for its turn, ends the gathering of a batch and commits it.
func (g *groupCommit[W]) lead(ctx context.Context, b *batch[W]) {
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
	b.found, b.err = g.commit(ctx, b.writes)
}

// withoutCondition is a commit of writes to timers that may be as they want.
func withoutCondition[W any](commit func(context.Context, []W) error) func(context.Context, []W) ([]bool, error) {
	return func(ctx context.Context, writes []W) ([]bool, error) {
		return make([]bool, len(writes)), commit(ctx, writes)
	}
}

// errNotCommitted is what those who wait are told if the one who commits for them panics.
var errNotCommitted = errors.New("the commit did not come to its end")
