package expiration

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
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
	// ask deals with a batch and returns an answer for each question. It is never called without any.
	ask func(context.Context, []Q) ([]A, error)
	// turn is full while somebody asks.
	turn chan struct{}

	mu   sync.Mutex   // guards next, and the batches that gather; a leaf, see the lock order in doc.go
	next *batch[Q, A] // the one that gathers and has room, or nil
}

// batch is what is asked for at once.
type batch[Q, A any] struct {
	questions []Q
	places    []*int // where each caller's question stands: one that is withdrawn makes another move
	begun     bool   // it gathers no longer

	decided chan struct{} // closed when there are answers, or err is set
	answers []A
	err     error
}

// errNotAsked: the caller gave up before the database was asked. So nothing was written, and nothing will be.
var errNotAsked = errors.New("given up before the database was asked")

// errUndecided is what all callers of a batch are told if asking panics.
var errUndecided = errors.New("the batch did not come to its end")

func newBatches[Q, A any](ask func(context.Context, []Q) ([]A, error)) *batches[Q, A] {
	return &batches[Q, A]{ask: ask, turn: make(chan struct{}, 1)}
}

// do returns the answer when the question's batch is decided. If the context ends while the batch still gathers, the question is
// withdrawn, and the error is errNotAsked and that of the context. Once the database is asked, do waits for the answer whatever
// becomes of the context: what may still be written must not be overtaken by the next write to the same timer.
//
// One of the callers asks for all of a batch: whoever has the turn first. So none is missed if it gives up while it waits for the turn.
func (b *batches[Q, A]) do(ctx context.Context, question Q) (answer A, err error) {
	if err = ctx.Err(); err != nil {
		return answer, fmt.Errorf("%w: %w", errNotAsked, err)
	}
	place := new(int)
	mine := b.gather(question, place)
	select {
	case <-mine.decided:
	case b.turn <- struct{}{}:
		b.lead(context.WithoutCancel(ctx), mine)
	case <-ctx.Done():
		if b.withdraw(mine, place) {
			return answer, fmt.Errorf("%w: %w", errNotAsked, ctx.Err())
		}
		<-mine.decided
	}
	if mine.err != nil {
		return answer, mine.err
	}
	return mine.answers[*place], nil
}

// gather adds a question to the batch that gathers, and returns that.
func (b *batches[Q, A]) gather(question Q, place *int) *batch[Q, A] {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next == nil || len(b.next.questions) == maxBatch {
		b.next = &batch[Q, A]{decided: make(chan struct{})}
	}
	mine := b.next
	*place = len(mine.questions)
	mine.questions = append(mine.questions, question)
	mine.places = append(mine.places, place)
	return mine
}

// withdraw takes a question out of its batch, and reports whether that still gathered.
func (b *batches[Q, A]) withdraw(mine *batch[Q, A], place *int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if mine.begun {
		return false
	}
	free, last := *place, len(mine.questions)-1
	mine.questions[free], mine.places[free] = mine.questions[last], mine.places[last]
	*mine.places[free] = free
	clear(mine.questions[last:]) // it may be large
	clear(mine.places[last:])
	mine.questions, mine.places = mine.questions[:last], mine.places[:last]
	return true
}

// lead is called by a caller of a batch that has the turn. It ends the gathering and asks, unless another caller of the batch has done so.
func (b *batches[Q, A]) lead(ctx context.Context, mine *batch[Q, A]) {
	defer func() { <-b.turn }()
	b.mu.Lock()
	if mine.begun { // and decided: whoever asked had the turn until then
		b.mu.Unlock()
		return
	}
	mine.begun = true
	if b.next == mine {
		b.next = nil
	}
	b.mu.Unlock()
	mine.err = errUndecided
	defer close(mine.decided)
	ctx, cancel := context.WithTimeout(ctx, batchTimeout)
	defer cancel()
	guard.Run("asking the database", func() { mine.answers, mine.err = b.ask(ctx, mine.questions) })
}

// withoutAnswers is for what has no answer but that it was done.
func withoutAnswers[Q any](ask func(context.Context, []Q) error) func(context.Context, []Q) ([]struct{}, error) {
	return func(ctx context.Context, questions []Q) ([]struct{}, error) {
		return make([]struct{}, len(questions)), ask(ctx, questions)
	}
}
