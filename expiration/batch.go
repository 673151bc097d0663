package expiration

import (
	"context"
	"errors"
	"sync"
	"time"
)

const (
	// maxBatch is how much the database is asked for at once, at the most.
	maxBatch = 512
	// batchTimeout is how long a batch may take before all who wait for it are told of a fault.
	batchTimeout = 30 * time.Second
)

// batches asks the database for many things of one kind together: while one batch is being dealt with, the next one gathers.
// Who comes when nothing is being dealt with waits for nobody. So many writes are one commit, and whatever comes, one
// connection is enough for it. Each caller has his answer when his own batch is decided.
type batches[Q, A any] struct {
	// ask deals with a batch and returns an answer for each question.
	ask func(context.Context, []Q) ([]A, error)
	// turn is full while somebody asks.
	turn chan struct{}

	mu   sync.Mutex   // guards next, and the questions in it; a leaf, see the lock order in doc.go
	next *batch[Q, A] // the one that gathers, or nil
}

// batch is what is asked for at once.
type batch[Q, A any] struct {
	questions []Q
	decided   chan struct{} // closed when there are answers, or err is set
	answers   []A
	err       error
}

func newBatches[Q, A any](ask func(context.Context, []Q) ([]A, error)) *batches[Q, A] {
	return &batches[Q, A]{ask: ask, turn: make(chan struct{}, 1)}
}

// do returns the answer when the question's batch is decided. It does not return before, not even if the caller hangs up: what
// may still be written must not be overtaken by the next write to the same timer.
func (b *batches[Q, A]) do(ctx context.Context, question Q) (answer A, err error) {
	b.mu.Lock()
	mine := b.next
	first := mine == nil || len(mine.questions) == maxBatch
	if first {
		mine = &batch[Q, A]{decided: make(chan struct{})}
		b.next = mine
	}
	place := len(mine.questions)
	mine.questions = append(mine.questions, question)
	b.mu.Unlock()

	if first { // and so the one who asks for all
		b.lead(context.WithoutCancel(ctx), mine)
	}
	<-mine.decided
	if mine.err != nil {
		return answer, mine.err
	}
	return mine.answers[place], nil
}

// lead waits for its turn, ends the gathering of a batch and asks.
func (b *batches[Q, A]) lead(ctx context.Context, mine *batch[Q, A]) {
	b.turn <- struct{}{}
	defer func() { <-b.turn }()
	mine.err = errUndecided
	defer close(mine.decided)
	b.mu.Lock()
	if b.next == mine {
		b.next = nil
	}
	b.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, batchTimeout)
	defer cancel()
	mine.answers, mine.err = b.ask(ctx, mine.questions)
}

// errUndecided is what those who wait are told if the one who asks for them panics.
var errUndecided = errors.New("the batch did not come to its end")

// withoutAnswers is for what has no answer but that it was done.
func withoutAnswers[Q any](ask func(context.Context, []Q) error) func(context.Context, []Q) ([]struct{}, error) {
	return func(ctx context.Context, questions []Q) ([]struct{}, error) {
		return make([]struct{}, len(questions)), ask(ctx, questions)
	}
}
