package main

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	_ "github.com/lib/pq" // the driver that Dendrite uses
	"gonum.org/v1/plot/plotter"
)

const (
	// growing is how many timers are refreshed again and again.
	growing = 10_000
	// growthBatch is how many keep-alives share a commit, as on a server under load.
	growthBatch = 500
	// growthSamples is how many times the database's size is read.
	growthSamples = 100
)

// growth records the size of the timers' database while the timers are refreshed. The refreshes go straight to the store, because so many
// HTTP requests would take hours.
func (b *comparison) growth(ctx context.Context) error {
	d, err := b.newDatabase(ctx, "growth")
	if err != nil {
		return err
	}
	if _, err = fill(ctx, d, growing, growing/participantsPerRoom, nil); err != nil {
		return err
	}
	store, closeStore, err := openStore(ctx, d.timers)
	if err != nil {
		return err
	}
	defer closeStore()
	all, err := renewals(ctx, store)
	if err != nil {
		return err
	}
	// The order is random, so that the timers of one commit are not the timers of one page.
	rand.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	var sizes plotter.XYs
	for done := 0; done < *refreshes; done += growthBatch {
		from := done % growing
		batch := all[from : from+growthBatch]
		deadline := time.Now().Add(endless)
		for i := range batch {
			batch[i].Deadline = deadline
		}
		found, err := store.Refresh(ctx, batch)
		if err != nil {
			return err
		}
		if len(found) != len(batch) {
			return errors.New("timers got lost")
		}
		if every := max(*refreshes/growthSamples/growthBatch, 1) * growthBatch; done%every == 0 {
			size, err := b.size(ctx, d.timers)
			if err != nil {
				return err
			}
			sizes = append(sizes, plotter.XY{X: float64(done+growthBatch) / 1e6, Y: float64(size) / (1 << 20)})
			if done%(10*every) == 0 {
				progress("%s: after %d keep-alives %.1f MiB", b.name, done+growthBatch, float64(size)/(1<<20))
			}
		}
	}
	var before, after float64
	for i, s := range sizes {
		if i <= len(sizes)/10 {
			before = max(before, s.Y)
		}
		after = max(after, s.Y)
	}
	b.add(fmt.Sprintf("greatest size of the database during %d keep-alives of %d timers / during the first tenth of them", *refreshes, growing),
		"bounded", "", []float64{after / before})
	if b.cluster != nil {
		share, err := inPlace(ctx, d.timers)
		if err != nil {
			return err
		}
		b.add("of these, written without touching an index", "nearly all", " %", []float64{share})
	}
	return b.plot("growth", drawing{
		title: fmt.Sprintf("Size of the database with %d timers", growing), x: "keep-alives (millions)", y: "size (MiB)",
		lines: []line{{name: "all files of the timers", points: sizes}},
	})
}

// size returns the size of the timers' database, with all its files, in bytes.
func (b *comparison) size(ctx context.Context, dsn string) (size int64, err error) {
	if b.cluster != nil {
		return size, ask(ctx, dsn, &size, "SELECT pg_total_relation_size('expiration_timers') + pg_total_relation_size('expiration_deadlines')")
	}
	name := strings.TrimPrefix(dsn, "file:")
	for _, file := range []string{name, name + "-wal"} {
		info, err := os.Stat(filepath.Clean(file))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return 0, err
		}
		size += info.Size()
	}
	return size, nil
}

// inPlace returns the percentage of updates for which PostgreSQL found space in the row's own page, so that it did not change an index.
func inPlace(ctx context.Context, dsn string) (share float64, err error) {
	return share, ask(ctx, dsn, &share,
		"SELECT 100.0 * n_tup_hot_upd / greatest(n_tup_upd, 1) FROM pg_stat_user_tables WHERE relname = 'expiration_deadlines'")
}

// ask runs a query that returns one value from PostgreSQL.
func ask(ctx context.Context, dsn string, value any, query string) error {
	db, err := sql.Open("postgres", dsn)
	if err != nil {
		return err
	}
	defer db.Close()
	return db.QueryRowContext(ctx, query).Scan(value)
}
