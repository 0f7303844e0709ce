"""The study, its seats, its people, their answers, and the answers that were taken back. A migration that ran somewhere is never edited: write the next one."""
from alembic import op
import sqlalchemy as sa

revision, down_revision = "0001", None


def answer_columns():
    return [sa.Column("id", sa.Integer, nullable=False), sa.Column("participant", sa.String(16), nullable=False), sa.Column("trial", sa.String(64), nullable=False),
            sa.Column("number", sa.Integer, nullable=False), sa.Column("block", sa.Integer, nullable=False), sa.Column("shots", sa.Integer, nullable=False),
            sa.Column("kind", sa.String(16), nullable=False), sa.Column("picture", sa.String(64), nullable=False), sa.Column("truth", sa.Text, nullable=False),
            sa.Column("instructed", sa.Text), sa.Column("answer", sa.Text, nullable=False), sa.Column("seconds", sa.Float, nullable=False),
            sa.Column("timed_by", sa.String(8), nullable=False), sa.Column("at", sa.DateTime(timezone=True), nullable=False)]


def upgrade():
    op.create_table("study", sa.Column("id", sa.Integer, nullable=False), sa.Column("name", sa.Text, nullable=False), sa.Column("design_hash", sa.String(64), nullable=False),
                    sa.Column("materials_hash", sa.String(64), nullable=False), sa.Column("secret", sa.String(64), nullable=False),
                    sa.Column("started", sa.DateTime(timezone=True), nullable=False), sa.Column("deleted", sa.Integer, nullable=False),
                    sa.PrimaryKeyConstraint("id", name="pk_study"), sa.CheckConstraint("id = 1", name="ck_study_one"))
    op.create_table("participants", sa.Column("id", sa.String(16), nullable=False), sa.Column("link_hash", sa.String(64), nullable=False), sa.Column("delete_hash", sa.String(64), nullable=False),
                    sa.Column("seat", sa.Integer, nullable=False), sa.Column("done", sa.Integer, nullable=False), sa.Column("undoable", sa.Boolean, nullable=False),
                    sa.Column("gone", sa.Boolean, nullable=False), sa.Column("joined", sa.DateTime(timezone=True), nullable=False),
                    sa.Column("seen", sa.DateTime(timezone=True), nullable=False), sa.Column("shown", sa.DateTime(timezone=True), nullable=False),
                    sa.Column("finished", sa.DateTime(timezone=True)), sa.PrimaryKeyConstraint("id", name="pk_participants"),
                    sa.UniqueConstraint("link_hash", name="uq_participants_link_hash"), sa.UniqueConstraint("delete_hash", name="uq_participants_delete_hash"))
    op.create_table("seats", sa.Column("seat", sa.Integer, autoincrement=False, nullable=False), sa.Column("participant", sa.String(16)),
                    sa.PrimaryKeyConstraint("seat", name="pk_seats"), sa.UniqueConstraint("participant", name="uq_seats_participant"),
                    sa.ForeignKeyConstraint(["participant"], ["participants.id"], name="fk_seats_participant", ondelete="SET NULL"))
    op.create_table("answers", *answer_columns(), sa.PrimaryKeyConstraint("id", name="pk_answers"),
                    sa.UniqueConstraint("participant", "trial", name="uq_answers_participant"),
                    sa.ForeignKeyConstraint(["participant"], ["participants.id"], name="fk_answers_participant", ondelete="CASCADE"))
    op.create_table("withdrawn", *answer_columns(), sa.Column("undone", sa.DateTime(timezone=True), nullable=False), sa.PrimaryKeyConstraint("id", name="pk_withdrawn"),
                    sa.ForeignKeyConstraint(["participant"], ["participants.id"], name="fk_withdrawn_participant", ondelete="CASCADE"))
    for table in ("answers", "withdrawn"): op.create_index(f"ix_{table}_participant", table, ["participant"])
