// Package batch is group commit: it joins many requests to the database into one commit.
//
// Questions that arrive while a batch is being decided form the next batch. When the database is idle, a question is asked at once. A
// caller whose context ends before its question was asked withdraws it, and nothing was written. After that the caller waits for the
// answer, because a write that may still happen must not be overtaken. A panic while asking is an error for all callers of that batch, and
// of no other.
package batch

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/matrix-org/dendrite/setup/mscs/msc4140/guard"
)

const (
	// Max is the greatest number of questions in a batch.
	Max = 512
	// Timeout is how long a batch may take before all its callers get an error.
	Timeout = 30 * time.Second
)

// Batches asks the database questions of one kind, in batches. All batches use one connection, one after the other. Each caller gets its
// answer when its own batch is decided.
type Batches[Q, A any] struct {
	// ask decides a batch and returns one answer per question. It is never called without questions.
	ask func(context.Context, []Q) ([]A, error)
	// asking is full while a batch is being decided.
	asking chan struct{}

	mu   sync.Mutex   // guards next, and batches until they have begun; a leaf in the lock order of expiration/doc.go
	next *batch[Q, A] // the batch that new questions join, or nil
}

// batch is a set of questions that are asked together.
type batch[Q, A any] struct {
	questions []Q
	places    []*int // the index of each caller's question; withdrawing one moves another
	begun     bool   // it is being decided, and takes no more questions

	decided chan struct{} // closed when answers or err are set
	answers []A
	err     error
}

// ErrNotAsked: the caller gave up before the database was asked. Nothing was written, and nothing will be.
var ErrNotAsked = errors.New("given up before the database was asked")

// ErrUndecided is the error of all callers of a batch if asking panics.
var ErrUndecided = errors.New("the batch was not completed")

// New returns batches that are decided by ask, see Batches.ask.
func New[Q, A any](ask func(context.Context, []Q) ([]A, error)) *Batches[Q, A] {
	return &Batches[Q, A]{ask: ask, asking: make(chan struct{}, 1)}
}

// Do asks a question and returns its answer when the batch is decided. If the context ends before the batch is asked, the question is
// withdrawn, and the error wraps ErrNotAsked and the context's error. Once the database is asked, Do waits for the answer whatever becomes
// of the context: a write that may still happen must not be overtaken by the next write to the same timer.
//
// One caller asks for the whole batch: the first one to get asking. So the batch is asked even if another caller gives up meanwhile.
func (b *Batches[Q, A]) Do(ctx context.Context, question Q) (answer A, err error) {
	if err = ctx.Err(); err != nil {
		return answer, fmt.Errorf("%w: %w", ErrNotAsked, err)
	}
	place := new(int)
	mine := b.gather(question, place)
	select {
	case <-mine.decided:
	case b.asking <- struct{}{}:
		b.lead(context.WithoutCancel(ctx), mine)
	case <-ctx.Done():
		if b.withdraw(mine, place) {
			return answer, fmt.Errorf("%w: %w", ErrNotAsked, ctx.Err())
		}
		<-mine.decided
	}
	if mine.err != nil {
		return answer, mine.err
	}
	return mine.answers[*place], nil
}

// gather adds a question to the next batch, and returns that batch.
func (b *Batches[Q, A]) gather(question Q, place *int) *batch[Q, A] {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next == nil || len(b.next.questions) == Max {
		b.next = &batch[Q, A]{decided: make(chan struct{})}
	}
	mine := b.next
	*place = len(mine.questions)
	mine.questions = append(mine.questions, question)
	mine.places = append(mine.places, place)
	return mine
}

// Len returns the number of questions in the next batch.
func (b *Batches[Q, A]) Len() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.next == nil {
		return 0
	}
	return len(b.next.questions)
}

// withdraw removes a question from its batch, and reports whether that had not begun.
func (b *Batches[Q, A]) withdraw(mine *batch[Q, A], place *int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if mine.begun {
		return false
	}
	free, last := *place, len(mine.questions)-1
	mine.questions[free], mine.places[free] = mine.questions[last], mine.places[last]
	*mine.places[free] = free
	clear(mine.questions[last:]) // release the question, which may be large
	clear(mine.places[last:])
	mine.questions, mine.places = mine.questions[:last], mine.places[:last]
	return true
}

// lead decides a batch, unless another of its callers has done so. The caller has filled asking, and lead empties it.
func (b *Batches[Q, A]) lead(ctx context.Context, mine *batch[Q, A]) {
	defer func() { <-b.asking }()
	b.mu.Lock()
	if mine.begun { // then it is decided too: asking was full until that
		b.mu.Unlock()
		return
	}
	mine.begun = true
	if b.next == mine {
		b.next = nil
	}
	b.mu.Unlock()
	mine.err = ErrUndecided
	defer close(mine.decided)
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	guard.Run("asking the database", func() { mine.answers, mine.err = b.ask(ctx, mine.questions) })
}

// WithoutAnswers adapts a function that only reports an error.
func WithoutAnswers[Q any](ask func(context.Context, []Q) error) func(context.Context, []Q) ([]struct{}, error) {
	return func(ctx context.Context, questions []Q) ([]struct{}, error) {
		return make([]struct{}, len(questions)), ask(ctx, questions)
	}
}
