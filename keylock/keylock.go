// Package keylock is a lock for each key that is in use just now, and no memory for any other. Waiting for one obeys a context, which a
// sync.Mutex cannot. Nothing is said about the order in which those who wait get it.
package keylock

import (
	"context"
	"errors"
	"sync"
)

// Locks are the locks of all keys.
type Locks[K comparable] struct {
	most int // how many may hold a lock, or wait for it; 0 is any number

	mu    sync.Mutex // guards what follows, and the users of each lock; a leaf
	locks map[K]*lock
	spare []*lock // some that were forgotten, to be used again: each refresh of a timer needs one
}

// maxSpare is how many locks are kept for later.
const maxSpare = 64

type lock struct {
	users int           // holders and waiters; the lock is forgotten at 0
	held  chan struct{} // of capacity 1; full while somebody holds the lock
}

// ErrCrowded: as many wait for the lock as may.
var ErrCrowded = errors.New("too many wait")

// New returns locks for which any number may wait.
func New[K comparable]() *Locks[K] { return Bounded[K](0) }

// Bounded returns locks that so many may hold or wait for at the same time, each of them.
func Bounded[K comparable](most int) *Locks[K] {
	return &Locks[K]{most: most, locks: map[K]*lock{}}
}

// Lock waits for the lock of key and returns the function that gives it back. The error is ErrCrowded or that of the context.
func (l *Locks[K]) Lock(ctx context.Context, key K) (unlock func(), err error) {
	own, err := l.join(key)
	if err != nil {
		return nil, err
	}
	select {
	case own.held <- struct{}{}:
		return func() { <-own.held; l.leave(key, own) }, nil
	case <-ctx.Done():
		l.leave(key, own)
		return nil, ctx.Err()
	}
}

func (l *Locks[K]) join(key K) (*lock, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	own := l.locks[key]
	if own != nil && own.users == l.most { // 0 users have no lock
		return nil, ErrCrowded
	}
	if own == nil {
		if last := len(l.spare) - 1; last >= 0 {
			own, l.spare = l.spare[last], l.spare[:last]
		} else {
			own = &lock{held: make(chan struct{}, 1)}
		}
		l.locks[key] = own
	}
	own.users++
	return own, nil
}

func (l *Locks[K]) leave(key K, own *lock) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if own.users--; own.users == 0 {
		delete(l.locks, key)
		if len(l.spare) < maxSpare {
			l.spare = append(l.spare, own)
		}
	}
}

// Len returns how many locks are in use.
func (l *Locks[K]) Len() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.locks)
}
