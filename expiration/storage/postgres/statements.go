package postgres

import (
	"context"
	"database/sql"
	"sync"
)

// statements keeps each statement prepared that it is given: to plan one can take longer than to run it. They are constants,
// so there are few of them.
type statements struct {
	db *sql.DB

	mu       sync.Mutex // guards prepared; a leaf
	prepared map[string]*sql.Stmt
}

func (s *statements) prepare(ctx context.Context, query string) (*sql.Stmt, error) {
	s.mu.Lock()
	statement := s.prepared[query]
	s.mu.Unlock()
	if statement != nil {
		return statement, nil
	}
	statement, err := s.db.PrepareContext(ctx, query)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if first := s.prepared[query]; first != nil { // two at the same time
		_ = statement.Close()
		return first, nil
	}
	s.prepared[query] = statement
	return statement, nil
}

// QueryContext implements shared.Reader.
func (s *statements) QueryContext(ctx context.Context, query string, args ...any) (*sql.Rows, error) {
	statement, err := s.prepare(ctx, query)
	if err != nil {
		return nil, err
	}
	return statement.QueryContext(ctx, args...)
}
